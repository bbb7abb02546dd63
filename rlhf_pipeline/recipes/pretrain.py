"""`rlhf pretrain`: a byte-level BPE tokenizer and a causal language model from text.

The base model of machines that cannot download one. With `model.path` it goes on training an existing model on text.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_pipeline import artifact, runtime
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.stages import PretrainConfig
from rlhf_pipeline.data import demo, prepare
from rlhf_pipeline.data.formats import detect, to_record
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow, Text
from rlhf_pipeline.data.sources import read_rows
from rlhf_pipeline.data.tokenizer import open_tokenizer, train_tokenizer, with_template
from rlhf_pipeline.files import publish
from rlhf_pipeline.recipes import language_model
from rlhf_pipeline.run import open_run


def main(config: PretrainConfig) -> None:
    """Run the stage.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 or 143 after a signal, with the state saved.
    """
    process = runtime.start(config.runtime)
    run = open_run(config, "pretrain")

    # 1 A tokenizer: of the model that training goes on from, named, or trained on the text
    parents = {"model": artifact.parent(config.model.path, kind=Kind.policy)} if config.model.path else {}
    source = config.tokenizer.path or config.model.path
    if source is not None:
        tokenizer = open_tokenizer(source, config.tokenizer, trust_remote_code=config.model.trust_remote_code)
    else:
        tokenizer = _own_tokenizer(config, run.folder / "tokenizer")
    renderer = Renderer(tokenizer)

    # 2 Documents, cut and tokenised before any process group exists
    train, heldout = prepare.train_and_heldout(config.data, renderer, kind="text", seed=config.seed)

    # 3 Train and hand over
    language_model.train(
        config,
        run=run,
        process=process,
        renderer=renderer,
        data={"text": train},
        heldout=heldout,
        mix_ratio=0.0,
        parents=parents,
    )


def _own_tokenizer(config: PretrainConfig, folder: Path) -> Any:
    """A tokenizer trained on the run's text, kept in the run's folder so that a resumed run opens the same one."""
    from filelock import FileLock

    assert config.model.shape is not None
    with FileLock(folder.with_name(".tokenizer.lock")):
        if not folder.is_dir():
            tokenizer = train_tokenizer(
                islice(_documents(config), config.tokenizer.train_documents),
                vocab_size=config.model.shape.vocab_size,
                context=config.model.shape.context,
            )
            partial = folder.with_name(folder.name + ".partial")
            with_template(tokenizer, config.tokenizer).save_pretrained(partial)
            publish(partial, folder)  # of several files, and a run may be killed between two of them
    return open_tokenizer(str(folder), config.tokenizer)


def _documents(config: PretrainConfig) -> Iterator[str]:
    """The training text; bad rows are left out here, and counted or refused when the documents are tokenised."""
    name = config.data.format
    for row in read_rows(demo.local_paths(config.data.train, Path(config.data.cache_dir)), split=config.data.split):
        if isinstance(row.value, BadRow):
            continue
        name = detect(row.value, "text") if name == "auto" else name
        try:
            record = to_record(row.value, "text", name)
        except BadRow:
            continue
        assert isinstance(record, Text)
        yield record.text
