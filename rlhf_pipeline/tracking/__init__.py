"""Tracking a run: `metrics.jsonl` always, wandb and TensorBoard as mirrors, a display. Cheap to import."""

from rlhf_pipeline.tracking.records import read_metrics, read_samples
from rlhf_pipeline.tracking.redaction import redact, redact_text
from rlhf_pipeline.tracking.tracker import Tracker, open_tracker

__all__ = ["Tracker", "open_tracker", "read_metrics", "read_samples", "redact", "redact_text"]
