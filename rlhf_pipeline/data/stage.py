"""What a training stage reads: its tokenizer, its data sets and their order. The stage and `rlhf prep` both ask here.

So whatever prep has made, the stage finds done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.direct import TRAITS, Unit
from rlhf_pipeline.config.stages import DpoConfig, PpoConfig, PretrainConfig, RmConfig, SftConfig, StageConfig
from rlhf_pipeline.data import order, prepare
from rlhf_pipeline.data import tokenizer as tokenizing
from rlhf_pipeline.data.dataset import Progress, records_of
from rlhf_pipeline.data.formats import Kind
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow, Text
from rlhf_pipeline.data.sources import fingerprint, read_rows
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.data.tokenizer import open_tokenizer, train_tokenizer, with_template
from rlhf_pipeline.files import publish, read_small, write_json

KINDS: dict[str, Kind] = {  # of data_sets
    "text": "text",
    "demonstrations": "demonstration",
    "pretraining": "text",
    "rankings": "ranking",
    "verdicts": "feedback",
    "prompts": "prompt",
}
MADE_FROM = "made_from.json"  # in the folder of a trained tokenizer


def open_renderer(config: StageConfig, *, progress: Progress | None = None) -> Renderer:
    """The stage's tokenizer with its chat template: named, the model's, or trained on the text and kept with the run.

    Raises:
        UserError: when there is none, or it is unfit.
    """
    path = config.tokenizer.path or config.model.path
    if path is not None:
        return tokenizing.open_renderer(path, config.tokenizer, trust_remote_code=config.model.trust_remote_code)
    assert isinstance(config, PretrainConfig), "the config check lets no other stage pass without a tokenizer"
    return Renderer(_own_tokenizer(config, Path(config.run_dir), progress))


def data_sets(
    config: StageConfig, renderer: Renderer, *, progress: Progress | None = None
) -> tuple[dict[str, TreeDataset], TreeDataset]:
    """(training sets by name, held-out set). Where there are two of the first, the second is mixed in.

    Raises:
        UserError: see `prepare.data_set`.
    """
    data, seed = config.data, config.seed
    match config:
        case PretrainConfig():
            text, heldout = prepare.train_and_heldout(data, renderer, kind="text", seed=seed, progress=progress)
            return {"text": text}, heldout
        case SftConfig():
            answers, heldout = prepare.train_and_heldout(
                data, renderer, kind="demonstration", seed=seed, progress=progress
            )
            sets = {"demonstrations": answers}
            if config.mix.ratio > 0:
                sets["pretraining"] = prepare.mixed_in(config.mix, data, renderer, progress=progress)
            return sets, heldout
        case RmConfig():
            rankings, heldout = prepare.train_and_heldout(data, renderer, kind="ranking", seed=seed, progress=progress)
            return {"rankings": rankings}, heldout
        case DpoConfig():
            name = preferences_of(config)
            found, heldout = prepare.train_and_heldout(data, renderer, kind=KINDS[name], seed=seed, progress=progress)
            return {name: found}, heldout
        case PpoConfig():
            prompts, heldout = prepare.train_and_heldout(data, renderer, kind="prompt", seed=seed, progress=progress)
            sets = {"prompts": prompts}
            if config.ptx.coefficient > 0:
                sets["pretraining"] = prepare.pretraining_of(config.ptx, data, renderer, progress=progress)
            return sets, heldout
    raise AssertionError(type(config))


def preferences_of(config: DpoConfig) -> str:
    """What the objective learns from, a name of `KINDS`."""
    return "verdicts" if TRAITS[config.objective.name].unit is Unit.verdicts else "rankings"


def demonstrations_to_normalise(
    config: RmConfig, renderer: Renderer, *, progress: Progress | None = None
) -> TreeDataset:
    """Answers whose mean reward becomes the zero of all rewards (see `prepare.to_normalise`).

    Raises:
        UserError: see `prepare.data_set`.
    """
    return prepare.to_normalise(config.normalise, config.data, renderer, progress=progress)


def batch_order(config: StageConfig, data: TreeDataset) -> order.BatchOrder:
    """The global batches of the stage's first training set; of PPO the prompts of every iteration."""
    epochs, seed = config.train.epochs, config.seed
    if isinstance(config, PpoConfig):
        prompts = config.rollout.episodes // config.rollout.samples
        return order.by_examples(len(data), batch=prompts, epochs=epochs, seed=seed, parts=data.parts)
    if config.batch.tokens is not None:
        return order.by_tokens(data.lengths, batch=config.batch.tokens, epochs=epochs, seed=seed, parts=data.parts)
    assert config.batch.examples is not None
    return order.by_examples(len(data), batch=config.batch.examples, epochs=epochs, seed=seed, parts=data.parts)


# A tokenizer of one's own


def _own_tokenizer(config: PretrainConfig, run_dir: Path, progress: Progress | None) -> Any:
    """A tokenizer trained on the run's text, kept in the run's folder so that a resumed run opens the same one.

    One that `rlhf prep` has made for other text or another size is made anew, unless a run has begun with it.
    """
    from filelock import FileLock

    assert config.model.shape is not None
    folder = run_dir / "tokenizer"
    run_dir.mkdir(parents=True, exist_ok=True)
    sources = prepare.entries(config.data.train, config.data, kind="text", seed=config.seed, progress=progress)
    with FileLock(folder.with_name(".tokenizer.lock")):
        if any((run_dir / "state").glob("step_*")) and folder.is_dir():
            return open_tokenizer(str(folder), config.tokenizer)
        now = _made_from(config, sources)
        if not _is_made_from(folder / MADE_FROM, now):
            tokenizer = train_tokenizer(
                islice(_documents(sources), config.tokenizer.train_documents),
                vocab_size=config.model.shape.vocab_size,
                context=config.model.shape.context,
            )
            partial = folder.with_name(folder.name + ".partial")
            with_template(tokenizer, config.tokenizer).save_pretrained(partial)
            write_json(partial / MADE_FROM, now)
            publish(partial, folder)  # of several files, and a run may be killed between two of them
    return open_tokenizer(str(folder), config.tokenizer)


def _is_made_from(file: Path, now: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(read_small(file)) == now)
    except (OSError, ValueError, RecursionError):  # not there, or not as it was written
        return False


def _made_from(config: PretrainConfig, sources: list[prepare.Entry]) -> dict[str, Any]:
    """All that a trained tokenizer depends on."""
    import tokenizers

    from rlhf_pipeline.data import tokenizer

    assert config.model.shape is not None
    return {
        "text": [[fingerprint(one.source.path, one.source.split), one.source.format] for one in sources],
        "max_examples": config.data.max_examples,
        "documents": config.tokenizer.train_documents,
        "vocab_size": config.model.shape.vocab_size,
        "context": config.model.shape.context,
        "template": config.tokenizer.template,
        "tokenizers": tokenizers.__version__,
        "code": hashlib.sha256(Path(tokenizer.__file__).read_bytes()).hexdigest(),
    }


def _documents(sources: list[prepare.Entry]) -> Iterator[str]:
    """The training text, a document of each source in turn.

    Bad rows are left out here, and counted or refused when the documents are tokenised.
    """
    open_ones = [_texts(entry) for entry in sources]
    while open_ones:
        for texts in list(open_ones):
            text = next(texts, None)
            if text is None:
                open_ones.remove(texts)
            else:
                yield text


def _texts(entry: prepare.Entry) -> Iterator[str]:
    source = entry.source
    read, rows = records_of(source, islice(read_rows(source.path, split=source.split), source.max_examples))
    for row in rows:
        try:
            for record in read(row):
                assert isinstance(record, Text)
                yield record.text
        except BadRow:
            continue
