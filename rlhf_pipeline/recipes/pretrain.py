"""`rlhf pretrain`: a byte-level BPE tokenizer and a causal language model from text.

The base model of machines that cannot download one. With `model.path` it goes on training an existing model on text.
"""

from __future__ import annotations

from rlhf_pipeline import artifact, runtime
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.stages import PretrainConfig
from rlhf_pipeline.data import stage
from rlhf_pipeline.data.progress import terminal_progress
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
    with terminal_progress() as progress:
        renderer = stage.open_renderer(config, progress=progress)

        # 2 Documents, cut and tokenised before any process group exists
        data, heldout = stage.data_sets(config, renderer, progress=progress)

    # 3 Train and hand over
    language_model.train(
        config,
        run=run,
        process=process,
        renderer=renderer,
        data=data,
        heldout=heldout,
        mix_ratio=0.0,
        parents=parents,
    )
