"""`rlhf sft`: supervised fine-tuning on demonstrations (InstructGPT's first stage, Ouyang et al. 2022, section 3.5).

The loss is on responses only; pretraining text may be mixed in (appendix C.3 of the paper does for the PPO start).
"""

from __future__ import annotations

from rlhf_pipeline import artifact, runtime
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.stages import SftConfig
from rlhf_pipeline.data import prepare
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.tokenizer import open_tokenizer
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
    source = config.tokenizer.path or config.model.path
    assert source is not None, "the config check lets no SFT pass without a tokenizer"
    renderer = Renderer(open_tokenizer(source, config.tokenizer, trust_remote_code=config.model.trust_remote_code))

    # 2 Demonstrations, rendered and tokenised before any process group exists
    train, heldout = prepare.train_and_heldout(config.data, renderer, kind="demonstration", seed=config.seed)
    data = {"demonstrations": train}
    if config.mix.ratio > 0:
        data["pretraining"] = prepare.mixed_in(config.mix, config.data, renderer)

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
