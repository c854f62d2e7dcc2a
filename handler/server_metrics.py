"""What the model server tells of itself through TorchServe's metrics: `GET /metrics` on the metrics
port, in Prometheus' format.

TorchServe learns a metric from its first line (`model_metrics_auto_detect` in config.properties).
Its other way, a file of names that `metrics_config` points to, is looked for where the server
happens to be started; where it is not found, no worker comes up. Histogram buckets are TorchServe's
own, 5 ms to 10 s; the size of a batch fits them as a number.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

COUNTER, HISTOGRAM = MetricTypes.COUNTER, MetricTypes.HISTOGRAM
# Name -> kind, unit, labels beside the model's name. deploy/grafana-dashboard.json draws them.
METRICS: dict[str, tuple[MetricTypes, str, tuple[str, ...]]] = {
    # Photos that were captioned, tokens of the captions that were answered.
    "captioner_photos_total": (COUNTER, "count", ()),
    "captioner_tokens_total": (COUNTER, "count", ()),
    # Requests that were refused or failed, by the type in their answer.
    "captioner_errors_total": (COUNTER, "count", ("Type",)),
    # Requests that were handed over together, bad ones included.
    "captioner_batch_size": (HISTOGRAM, "count", ()),
    # One photo: its bytes to the model's input.
    "captioner_decode_seconds": (HISTOGRAM, "seconds", ()),
    # One batch: its photos through the encoder, then the captions from their memory. On a GPU the
    # encoder's work is waited for, and so counted, by the search.
    "captioner_encode_seconds": (HISTOGRAM, "seconds", ()),
    "captioner_search_seconds": (HISTOGRAM, "seconds", ()),
}


class ServerMetrics:
    """One model's metrics. Each update is a line on standard output, which TorchServe reads."""

    def __init__(self, cache: Any, model: str) -> None:
        """`cache` is `context.metrics` of TorchServe's worker."""
        self.model = model
        self.metrics = {
            name: cache.add_metric_to_cache(name, unit, ["ModelName", *labels], kind)
            for name, (kind, unit, labels) in METRICS.items()
        }

    def add(self, name: str, value: float, *labels: str) -> None:
        """Counts `value` more, or puts it into a histogram."""
        self.metrics[name].add_or_update(value, [self.model, *labels])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Puts the seconds of a block into a histogram, unless it raises."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)
