"""Metrics of the model server, which TorchServe returns for `GET /metrics` on the metrics port, in
the format of Prometheus.

TorchServe registers a metric when it is first logged (`model_metrics_auto_detect` in
config.properties). The alternative, a file that `metrics_config` names, is searched in the folder
where the server is started; if it is missing, no worker starts. Histograms have TorchServe's own
buckets, from 5 ms to 10 s; the size of a batch fits into them as a number.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

COUNTER, HISTOGRAM = MetricTypes.COUNTER, MetricTypes.HISTOGRAM
# Name -> kind, unit, labels besides the model's name. deploy/grafana-dashboard.json plots them.
METRICS: dict[str, tuple[MetricTypes, str, tuple[str, ...]]] = {
    # Photos that were captioned, and tokens of the captions that were returned.
    "captioner_photos_total": (COUNTER, "count", ()),
    "captioner_tokens_total": (COUNTER, "count", ()),
    # Requests that were refused or failed, by the type of the error.
    "captioner_errors_total": (COUNTER, "count", ("Type",)),
    # Requests in one batch, including invalid ones.
    "captioner_batch_size": (HISTOGRAM, "count", ()),
    # Decoding and preprocessing of one photo.
    "captioner_decode_seconds": (HISTOGRAM, "seconds", ()),
    # Encoder and search of one batch. On a GPU, which works asynchronously, the search waits for
    # the encoder, whose time is therefore included in that of the search.
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
        """Adds `value` to a counter or a histogram."""
        self.metrics[name].add_or_update(value, [self.model, *labels])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of a block to a histogram, unless the block raises."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)
