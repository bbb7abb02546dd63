"""`python -m rlhf_pipeline` and `torchrun -m rlhf_pipeline` are the `rlhf` command."""

from rlhf_pipeline.cli import app

app(prog_name="rlhf")
