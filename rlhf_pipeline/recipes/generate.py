"""`rlhf generate`: answers to prompts, as JSON lines.

Every answer is drawn by numbers of its own (seed, prompt, sample, position), so a run that was interrupted, or one in
several processes, writes the file that an undisturbed one would have written, up to the rounding of logits. With best_of=N
a prompt's N answers are scored as soon as they are there, and the best is written.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline import runtime
from rlhf_pipeline.config.stages import GenerateConfig
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, write_json
from rlhf_pipeline.generation import responses
from rlhf_pipeline.generation.cache import Family
from rlhf_pipeline.generation.decode import LENGTH, STOP, Completion, Question, completions
from rlhf_pipeline.generation.load import content_hash, open_renderer
from rlhf_pipeline.generation.progress import Meter
from rlhf_pipeline.generation.prompts import STDIN, Asked, Prompts, read_prompts
from rlhf_pipeline.models.ready import open_model
from rlhf_pipeline.run import open_run
from rlhf_pipeline.scoring import best_of
from rlhf_pipeline.scoring import sources as scoring
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.sources import Source

STDOUT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is opened before the first answer is drawn."""

    config: GenerateConfig
    renderer: Renderer
    identity: str  # of the model, by content
    model: Any
    prompts: Prompts
    sources: dict[str, Source]  # that choose among answers; none where each is written
    counts: dict[str, Counter[str]]  # what each of them counts, see `sources.COUNTS`


def main(config: GenerateConfig) -> None:
    """Answer the prompts.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 after Ctrl-C; the answers so far are kept.
    """
    process = runtime.start(config.runtime)
    _check_places(config)
    scoring.check_sources(config.rewards)
    identity = content_hash(config.model)  # of an artifact it checks every file, so before any is opened
    renderer = open_renderer(config.model, config.tokenizer)
    model = open_model(config.model, renderer.tokenizer, process.device)
    prompts = read_prompts(config.prompts, renderer, context=context_of(model))
    job = Job(
        config=config,
        renderer=renderer,
        identity=identity,
        model=model,
        prompts=prompts,
        sources=scoring.open_sources(config.rewards, device=process.device),
        counts={name: Counter() for name in config.rewards},
    )
    try:
        if config.output == STDOUT:
            _to_stdout(job)
        else:
            _to_file(job, process)
    except KeyboardInterrupt:
        where = "" if config.output == STDOUT else "; the same command goes on from here"
        sys.stderr.write(f"\nstopped{where}\n")
        raise SystemExit(130) from None


def context_of(model: Any) -> int | None:
    """Tokens that the model was built for; None where that is not bounded."""
    return Family(model).context


def _check_places(config: GenerateConfig) -> None:
    """What can be refused before anything is loaded."""
    several = runtime.world_size() > 1
    if several and config.output == STDOUT:
        raise UserError("output=-: several processes cannot share standard output; name a file")
    if several and config.prompts.path == STDIN:
        raise UserError("prompts.path=-: several processes cannot share standard input; name a file")


def _to_stdout(job: Job) -> None:
    config, pairs = job.config, _every(job)
    meter = Meter(len(pairs), shown=True)
    _tell(job, meter)
    _check_scorers(job)
    rows = []
    for batch in answers(job, pairs, meter):
        rows += batch
        sys.stdout.write("".join(map(responses.line_of, batch)))
        sys.stdout.flush()
    _tell_counts(job, meter)
    meter.message(summary(config, rows, meter))


def _to_file(job: Job, process: runtime.Runtime) -> None:
    config = job.config
    run = open_run(config, "generate")
    output = Path(config.output) if config.output else run.folder / "responses.jsonl"
    if runtime.world_size() > 1:
        runtime.join_process_group(process, timeout_minutes=config.runtime.rank_timeout_minutes)
    _check_scorers(job)
    with runtime.main_first():
        if runtime.is_main():
            new = not (run.folder / "inputs.json").is_file()
            responses.check_writable(output, new=new)
            responses.check_inputs(run.folder, inputs_of(job))
            responses.drop_torn_lines(run.folder)
    parts = responses.partial_files(run.folder)
    done = responses.finished([output, *parts])
    runtime.barrier()  # everyone has read before anyone writes
    every = _every(job)
    missing = [pair for pair in every if pair not in done]
    own = missing[runtime.rank() :: runtime.world_size()]
    meter = Meter(len(own), shown=runtime.is_main())
    _tell(job, meter)
    if done:
        meter.message(f"{len(done)} of {len(every)} answers are there already")
    if missing:
        file = responses.partial_file(run.folder, runtime.rank())
        with runtime.at_own_pace():
            for batch in answers(job, own, meter):
                responses.append(file, batch)
        _tell_counts(job, meter)
    with runtime.main_first():
        rows = responses.merge(run.folder, output) if runtime.is_main() else []
        if rows and config.best_of > 1:
            with disk_errors("how the answers were chosen", run.folder, kept=f"The answers are in {output}."):
                write_json(run.folder / "best_of.json", choice_of(config.best_of, rows))
    if runtime.is_main():
        meter.message(f"{output}: {summary(config, rows, meter)}")


def _every(job: Job) -> list[responses.Pair]:
    """The lines of the whole output. The best of several answers to a prompt is its only one there, number 0."""
    return [(asked.index, sample) for asked in job.prompts.asked for sample in range(job.config.sampling.samples)]


def inputs_of(job: Job) -> dict[str, str]:
    """What the answers depend on beside the config."""
    models = {name: source.model.identity for name, source in job.sources.items() if source.model is not None}
    return {
        "model": job.identity,
        "tokenizer": job.renderer.tokenizer_hash,
        "template": job.renderer.template_hash,
        "prompts": job.prompts.fingerprint,
        **{f"rewards.{name}": identity for name, identity in models.items()},
    }


def answers(job: Job, pairs: Sequence[responses.Pair], meter: Meter) -> Iterator[list[dict[str, Any]]]:
    """Output rows of the wanted (index, sample) pairs, batch by batch."""
    config = job.config
    wanted: dict[int, list[int]] = defaultdict(list)
    for index, sample in pairs:
        wanted[index].append(sample)
    asked = {one.index: one for one in job.prompts.asked if one.index in wanted}
    drawn = {index: range(config.best_of) if config.best_of > 1 else wanted[index] for index in asked}
    batches = completions(
        job.model,
        [Question(prompt=one.tokens, id=index, samples=tuple(drawn[index])) for index, one in asked.items()],
        config.sampling,
        end_ids=job.renderer.end_ids,
        pad_id=job.renderer.eos_id,
        seed=config.seed,
        tick=meter.tick,
    )
    for rows in _chosen(job, asked, batches) if config.best_of > 1 else _each(job, asked, batches):
        meter.answers += len(rows)
        yield rows


def _each(job: Job, asked: dict[int, Asked], batches: Iterable[list[Completion]]) -> Iterator[list[dict[str, Any]]]:
    """A row for each answer."""
    for batch in batches:
        yield [responses.row_of(asked[one.id], one, text_of(job, one), _ids(job, one)) for one in batch]


def _chosen(job: Job, asked: dict[int, Asked], batches: Iterable[list[Completion]]) -> Iterator[list[dict[str, Any]]]:
    """A row for each prompt: the best of its answers, as number 0, with what it was chosen for."""
    for prompts in best_of.by_prompt(batches, job.config.best_of):
        episodes = [[_episode(job, asked[one.id], one) for one in some] for some in prompts]
        rows = []
        for place, best in enumerate(best_of.choose(job.sources, episodes, job.counts)):
            one, said = prompts[place][best.place], episodes[place][best.place].response
            more = {"score": best.score, "scores": best.scores, "best_of": job.config.best_of, **_ids(job, one)}
            rows.append(responses.row_of(asked[one.id], dataclasses.replace(one, sample=0), said, more))
        yield rows


def _ids(job: Job, answer: Completion) -> dict[str, Any]:
    """The answer's tokens with its end token, where they are wanted: its text does not always tell them."""
    return {"response_ids": answer.tokens.tolist()} if job.config.token_ids else {}


def _episode(job: Job, asked: Asked, answer: Completion) -> Episode:
    """The answer as scorers take it: with the text that is written."""
    return Episode(
        prompt=asked.messages,
        response=text_of(job, answer),
        finished=answer.finish == STOP,
        columns=asked.columns,
        origin=asked.origin,
    )


def text_of(job: Job, answer: Completion) -> str:
    """What is written of an answer."""
    return str(job.renderer.tokenizer.decode(answer.text_tokens, skip_special_tokens=True)).strip()


def _tell(job: Job, meter: Meter) -> None:
    asked = job.prompts.asked
    for note in (*job.prompts.notes, *scoring.describe(job.sources)):
        meter.message(note)
    most, context = job.config.sampling.max_new_tokens, context_of(job.model)
    short = 0 if context is None else sum(len(one.tokens) + most > context for one in asked)
    if short:
        meter.message(
            f"{short} of {len(asked)} prompts leave less than sampling.max_new_tokens={most} of the model's "
            f"context of {context} tokens; their answers end there"
        )


def _check_scorers(job: Job) -> None:
    """Refuse prompts that a reward model cannot read. Called by every process."""
    scoring.check_prompts(job.sources, ((one.origin, one.messages) for one in job.prompts.asked))


def _tell_counts(job: Job, meter: Meter) -> None:
    """What scorers counted, over all processes. Called by every process."""
    own = {f"{name}: {what}": float(job.counts[name][what]) for name in job.sources for what in scoring.COUNTS}
    for what, count in runtime.sum_over_ranks(own).items():
        if count:
            meter.message(f"rewards.{what} {count:.0f}")


def choice_of(number: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the best of so many answers are: mean scores of those that were chosen, and what the choice costs at most."""
    return {
        "best_of": number,
        "answers": len(rows),
        "score": sum(row["score"] for row in rows) / len(rows),
        "scores": {name: sum(row["scores"][name] for row in rows) / len(rows) for name in rows[0]["scores"]},
        "kl_upper_bound": best_of.kl_upper_bound(number),
    }


def summary(config: GenerateConfig, rows: Sequence[dict[str, Any]], meter: Meter) -> str:
    """One line: how many answers, how fast, how long, how many came to their end, and what a choice among several was."""
    length = sum(row["response_tokens"] for row in rows) / len(rows)
    ended = sum(row["finish_reason"] != LENGTH for row in rows) / len(rows)
    speed = f"{meter.tokens / meter.seconds:,.0f} tokens/s in {meter.seconds:.1f} s, " if meter.tokens else ""
    chosen = ""
    if config.best_of > 1:
        choice = choice_of(config.best_of, rows)
        chosen = (
            f"; each the best of {choice['best_of']}, score {choice['score']:.4g} on average, KL from what they are drawn "
            f"from at most {choice['kl_upper_bound']:.3f} nats a prompt (upper bound: log N - (N-1)/N)"
        )
    return f"{len(rows)} answers, {speed}{length:.1f} tokens on average, {ended:.0%} finished{chosen}"
