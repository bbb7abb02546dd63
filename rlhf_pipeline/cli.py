"""`rlhf <command> [arguments]`: Typer owns the command names, Hydra owns every argument of a stage."""

from __future__ import annotations

import os
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The InstructGPT recipe, one stage at a time. Arguments of a stage are config overrides: key=value.",
)

TRAINING = {
    "pretrain": "Train a tokenizer and a base language model on text.",
    "sft": "Fine-tune a model on demonstrations.",
    "rm": "Train a reward model on rankings, K answers a prompt.",
    "ppo": "Train a policy against reward models, programs or served scorers, with a KL penalty.",
    "dpo": "Train a policy straight from preferences: DPO, KTO, SimPO and ten more objectives.",
}
STAGES = {
    **TRAINING,
    "prep": "Check, tokenise and count data before any training: rlhf prep [STAGE] with that stage's arguments.",
    "generate": "Answer prompts from a file, standard input or the lab, as JSON lines.",
    "chat": "Talk to a model in the terminal.",
    "score": "Give answers from a file their rewards, as JSON lines.",
    "evaluate": "Score models beside each other.",
    "report": "Tell what is in a folder of runs as one HTML page: rlhf report runs/demo.",
}

# What `rlhf plan` takes without its section's name.
SHORT = ("gpus", "gpus_per_host", "gpu_memory", "host_memory", "gpu")

FORWARDING = {"ignore_unknown_options": True, "allow_extra_args": True}


def _complete(ctx: typer.Context) -> list[str]:
    from rlhf_pipeline.hydra_bridge import complete

    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return complete(str(ctx.info_name), typed)


HydraArgs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE | HYDRA FLAGS]...", autocompletion=_complete, show_default=False),
]


def _add_stage(name: str, summary: str) -> None:
    # No help option of its own: `rlhf sft --help` is Hydra's, which lists config groups and values.
    @app.command(name, help=summary, add_help_option=False, context_settings=FORWARDING)
    def command(hydra_args: HydraArgs = None) -> None:
        from rlhf_pipeline.hydra_bridge import (  # keeps `rlhf --help` free of Hydra and torch
            names_folder,
            quoted,
            run_stage,
        )

        args = hydra_args or []
        if name == "prep" and args and args[0] in TRAINING:
            run_stage(args[0], args[1:], recipe="prep")
        elif name == "report" and args and names_folder(args[0]):
            run_stage(name, [f"folder={quoted(args[0])}", *args[1:]])
        else:
            run_stage(name, args)


for _name, _summary in STAGES.items():
    _add_stage(_name, _summary)


@app.command(context_settings={**FORWARDING, "allow_interspersed_args": False})
def plan(
    stage_args: Annotated[
        list[str] | None,
        typer.Argument(metavar="STAGE [KEY=VALUE]...", autocompletion=_complete, show_default=False),
    ] = None,
) -> None:
    """Tell what a stage's run takes before there is one: memory, time: rlhf plan ppo ... gpus=64 gpu_memory=80GB."""
    from rlhf_pipeline import failures
    from rlhf_pipeline.errors import UserError
    from rlhf_pipeline.hydra_bridge import PLAN, run_stage

    stage, *args = stage_args or [""]
    if stage not in TRAINING:
        error = UserError(
            f"{' '.join(['rlhf plan', stage]).strip()}: name what to plan first, one of {', '.join(TRAINING)}"
        )
        raise SystemExit(failures.leave(error, PLAN))
    run_stage(stage, [f"machine.{arg}" if arg.partition("=")[0] in SHORT else arg for arg in args], recipe=PLAN)


@app.command(context_settings={**FORWARDING, "allow_interspersed_args": False})
def launch(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND [KEY=VALUE]...", help="such as: sft name=big")],
    num_processes: Annotated[int, typer.Option(help="Processes on this machine, one a GPU.", min=1)] = 1,
    hostfile: Annotated[str | None, typer.Option(help="Machines to run on by ssh; lines: <host> slots=<GPUs>.")] = None,
    master_port: Annotated[int | None, typer.Option(help="A free port is found when this is left out.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="First host's address, if not its name in the file.")] = None,
) -> None:
    """Run a stage in several processes."""
    from rlhf_pipeline.launch import launch as start

    code = start(
        command, num_processes=num_processes, hostfile=hostfile, master_port=master_port, master_addr=master_addr
    )
    raise typer.Exit(code)


@app.command()
def version() -> None:
    """Print the version."""
    from rlhf_pipeline import __version__

    typer.echo(__version__)
