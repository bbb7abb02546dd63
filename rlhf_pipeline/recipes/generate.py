"""`rlhf generate`: answers to prompts, as JSON lines.

Every answer is drawn by numbers of its own (seed, prompt, sample, position), so a run that was interrupted, or one in
several processes, writes the file that an undisturbed one would have written, up to the rounding of logits.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline import runtime
from rlhf_pipeline.config.stages import GenerateConfig
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation import responses
from rlhf_pipeline.generation.cache import Family
from rlhf_pipeline.generation.decode import LENGTH, Question, completions
from rlhf_pipeline.generation.load import content_hash, open_model, open_renderer
from rlhf_pipeline.generation.progress import Meter
from rlhf_pipeline.generation.prompts import STDIN, Asked, Prompts, read_prompts
from rlhf_pipeline.run import open_run

STDOUT = "-"


def main(config: GenerateConfig) -> None:
    """Answer the prompts.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 after Ctrl-C; the answers so far are kept.
    """
    process = runtime.start(config.runtime)
    _check_places(config)
    renderer = open_renderer(config.model, config.tokenizer)
    identity = content_hash(config.model)
    model = open_model(config.model, renderer.tokenizer, process.device)
    prompts = read_prompts(config.prompts, renderer, context=context_of(model))
    try:
        if config.output == STDOUT:
            _to_stdout(config, model, renderer, prompts)
        else:
            _to_file(config, process, identity, model, renderer, prompts)
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


def _to_stdout(config: GenerateConfig, model: Any, renderer: Renderer, prompts: Prompts) -> None:
    pairs = [(asked.index, sample) for asked in prompts.asked for sample in range(config.sampling.samples)]
    meter = Meter(len(pairs), shown=True)
    _tell(prompts, config, context_of(model), meter)
    rows = []
    for batch in answers(config, model, renderer, prompts.asked, pairs, meter):
        rows += batch
        sys.stdout.write("".join(map(responses.line_of, batch)))
        sys.stdout.flush()
    meter.message(summary(rows, meter))


def _to_file(
    config: GenerateConfig, process: runtime.Runtime, identity: str, model: Any, renderer: Renderer, prompts: Prompts
) -> None:
    run = open_run(config, "generate")
    output = Path(config.output) if config.output else run.folder / "responses.jsonl"
    if runtime.world_size() > 1:
        runtime.join_process_group(process, timeout_minutes=config.runtime.rank_timeout_minutes)
    with runtime.main_first():
        if runtime.is_main():
            new = not (run.folder / "inputs.json").is_file()
            responses.check_writable(output, new=new)
            responses.check_inputs(run.folder, inputs_of(identity, renderer, prompts))
            responses.drop_torn_lines(run.folder)
    parts = responses.partial_files(run.folder)
    done = responses.finished([output, *parts])
    runtime.barrier()  # everyone has read before anyone writes
    every = [(asked.index, sample) for asked in prompts.asked for sample in range(config.sampling.samples)]
    missing = [pair for pair in every if pair not in done]
    meter = Meter(len(missing[runtime.rank() :: runtime.world_size()]), shown=runtime.is_main())
    _tell(prompts, config, context_of(model), meter)
    if done:
        meter.message(f"{len(done)} of {len(every)} answers are there already")
    if missing:
        own = missing[runtime.rank() :: runtime.world_size()]
        file = responses.partial_file(run.folder, runtime.rank())
        for batch in answers(config, model, renderer, prompts.asked, own, meter):
            responses.append(file, batch)
    runtime.barrier()
    with runtime.main_first():
        rows = responses.merge(run.folder, output) if runtime.is_main() else []
    if runtime.is_main():
        meter.message(f"{output}: {summary(rows, meter)}")


def inputs_of(identity: str, renderer: Renderer, prompts: Prompts) -> dict[str, str]:
    """What the answers depend on beside the config."""
    return {
        "model": identity,
        "tokenizer": renderer.tokenizer_hash,
        "template": renderer.template_hash,
        "prompts": prompts.fingerprint,
    }


def answers(
    config: GenerateConfig,
    model: Any,
    renderer: Renderer,
    asked: Sequence[Asked],
    pairs: Sequence[responses.Pair],
    meter: Meter,
) -> Iterator[list[dict[str, Any]]]:
    """Output rows of the wanted (index, sample) pairs, batch by batch."""
    wanted: dict[int, list[int]] = defaultdict(list)
    for index, sample in pairs:
        wanted[index].append(sample)
    by_index = {one.index: one for one in asked if one.index in wanted}
    questions = [Question(prompt=one.tokens, id=index, samples=tuple(wanted[index])) for index, one in by_index.items()]
    batches = completions(
        model,
        questions,
        config.sampling,
        end_ids=renderer.end_ids,
        pad_id=renderer.eos_id,
        seed=config.seed,
        tick=meter.tick,
    )
    for batch in batches:
        meter.answers += len(batch)
        texts = [str(renderer.tokenizer.decode(one.text_tokens, skip_special_tokens=True)).strip() for one in batch]
        yield [responses.row_of(by_index[one.id], one, text) for one, text in zip(batch, texts, strict=True)]


def _tell(prompts: Prompts, config: GenerateConfig, context: int | None, meter: Meter) -> None:
    for note in prompts.notes:
        meter.message(note)
    most = config.sampling.max_new_tokens
    short = 0 if context is None else sum(len(one.tokens) + most > context for one in prompts.asked)
    if short:
        meter.message(
            f"{short} of {len(prompts.asked)} prompts leave less than sampling.max_new_tokens={most} of the model's "
            f"context of {context} tokens; their answers end there"
        )


def summary(rows: Sequence[dict[str, Any]], meter: Meter) -> str:
    """One line: how many answers, how fast, how long, how many came to their end."""
    length = sum(row["response_tokens"] for row in rows) / len(rows)
    ended = sum(row["finish_reason"] != LENGTH for row in rows) / len(rows)
    speed = f"{meter.tokens / meter.seconds:,.0f} tokens/s in {meter.seconds:.1f} s, " if meter.tokens else ""
    return f"{len(rows)} answers, {speed}{length:.1f} tokens on average, {ended:.0%} finished"
