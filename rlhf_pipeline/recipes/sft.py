"""`rlhf sft`: supervised fine-tuning on demonstrations (InstructGPT's first stage, Ouyang et al. 2022, section 3.5).

The loss is on responses only; pretraining text may be mixed in (appendix C.3 of the paper does for the PPO start).
"""

from __future__ import annotations

from rlhf_pipeline import artifact, runtime
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.stages import SftConfig
from rlhf_pipeline.data import stage
from rlhf_pipeline.data.progress import terminal_progress
from rlhf_pipeline.recipes import language_model
from rlhf_pipeline.run import open_run


def main(config: SftConfig) -> None:
    """Run the stage.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 or 143 after a signal, with the state saved.
    """
    process = runtime.start(config.runtime)
    run = open_run(config, "sft")

    # 1 The model to start from, and its tokenizer with the chat template
    parents = {"model": artifact.parent(config.model.path, kind=Kind.policy)} if config.model.path else {}
    renderer = stage.open_renderer(config)

    # 2 Demonstrations, and text to mix in, rendered and tokenised before any process group exists
    with terminal_progress() as progress:
        data, heldout = stage.data_sets(config, renderer, progress=progress)

    # 3 Train and hand over
    language_model.train(
        config,
        run=run,
        process=process,
        renderer=renderer,
        data=data,
        heldout=heldout,
        mix_ratio=config.mix.ratio,
        parents=parents,
    )
