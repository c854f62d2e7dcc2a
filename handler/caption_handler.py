"""The class that TorchServe loads. `handler.request` parses requests, `handler.captioner` captions
photos, and `handler.answer` formats the answers."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from handler.answer import (
    Job,
    TokenStream,
    answer,
    check_stream,
    failure,
    model_card,
    searched_together,
)
from handler.attention_maps import shrunk
from handler.beam_search import InvalidParameter
from handler.captioner import Captioner, prompted, yielding
from handler.errors import UserError
from handler.image_preprocess import (
    Patience,
    check,
    decode,
    decode_resized,
    seen_region,
    to_tensor,
)
from handler.request import HandlerSettings, parse_request, to_json, within
from handler.server_metrics import ServerMetrics

log = logging.getLogger(__name__)

# The status line must be ASCII without line feeds: anything else crashes the worker.
PHRASES = {400: "Bad Request", 413: "Payload Too Large", 415: "Unsupported Media Type"}


class CaptionHandler:
    """Captions a batch of requests. An invalid request does not affect the others."""

    def initialize(self, context: Any) -> None:
        """Loads the export in the archive's folder. The section `handler` of `model-config.yaml`
        sets `threads`, `decoding` and `max_beam_tokens` (see `handler.request.HandlerSettings`)."""
        # Otherwise TorchServe decodes JSON bodies itself, without the limits of parse_json().
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        settings = HandlerSettings.read((context.model_yaml_config or {}).get("handler"))
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        self.captioner = Captioner.load(
            Path(properties["model_dir"]),
            device=f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu",
            threads=settings.threads,
        )
        own = self.captioner.decoding
        self.captioner.decoding = {**yielding(settings.decoding, own), **own}
        try:
            self.captioner.options()
        except InvalidParameter as error:
            raise UserError(f"model-config.yaml: handler.decoding: {error}") from error
        self.max_beam_tokens = settings.max_beam_tokens
        manifest, config = context.manifest["model"], self.captioner.config
        self.model = {
            "name": manifest["modelName"],
            "version": manifest["modelVersion"],
            "checkpoint": config["checkpoint"],
            "precision": config["precision"],
        }
        self.metrics = ServerMetrics(context.metrics, self.model["name"])
        # A broken model fails now, not in each request, and the first client does not wait for the
        # first, slower run of TorchScript.
        self.captioner.caption([Image.new("RGB", (32, 32))])

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str | bytes]:
        """Returns one answer per request, in order."""
        answers: dict[int, Any] = {}
        valid = []
        for index, fields in enumerate(data):
            try:
                headers = context.get_all_request_header(index)
                # For gRPC, which has no headers, this contains the content type of each field.
                grpc = all(isinstance(value, dict) for value in headers.values())
                if grpc:
                    # Ends a StreamPredictions call. TorchServe would otherwise wait for more
                    # answers and then restart the worker.
                    context.set_response_header(index, "ts_stream_next", "false")
                if not fields and header(headers, "describe"):
                    # From the management API: a client that sends this header also sends a body.
                    answers[index] = model_card(self.captioner, self.model, self.max_beam_tokens)
                else:
                    valid.append(self._parse(index, fields, headers, grpc))
            except Exception as error:
                answers[index] = failure(error)
        patience = Patience()
        # Ordinary photos first, because a slow one reduces the time for those that follow.
        for job in sorted(valid, key=lambda job: (job.photo.effort, len(job.photo.data))):
            try:
                self._decode(job, patience)
            except Exception as error:
                answers[job.index] = failure(error)
        jobs = [job for job in valid if job.index not in answers]
        for job, body in zip(jobs, self._caption(jobs, context), strict=True):
            answers[job.index] = body
        if data != [{}]:  # a request for the model card
            self.metrics.add("captioner_batch_size", len(data))
        return [self._finish(index, answers[index], context) for index in range(len(data))]

    def _parse(
        self, index: int, fields: dict[str, Any], headers: Mapping[str, Any], grpc: bool
    ) -> Job:
        """Parses and checks one request. Raises the typed errors of `handler.request`."""
        request = parse_request(fields, header(headers, "content-type"))
        per_prompt = [request.options]
        if request.prompts is not None:
            per_prompt = prompted(request.options, request.prompts)
        asked = "max_new_tokens" in request.options
        longest = self.captioner.decoder.max_positions - 1
        most = self.max_beam_tokens // len(per_prompt)
        options = [within(self.captioner.options(**o), longest, most, asked) for o in per_prompt]
        explain = not grpc and header(headers, "explain") == "True"
        as_picture = explain and "image/png" in header(headers, "accept").lower()
        if request.stream:
            check_stream(options[0], grpc, explain)
        if request.prompts is not None and (request.stream or as_picture):
            raise InvalidParameter(
                "prompts", "a stream or a picture can only have one prompt; use prompt instead"
            )
        request.attention = request.attention or explain
        return Job(index, request, check(request.photo), options, as_picture)

    def _decode(self, job: Job, patience: Patience) -> None:
        """Decodes and preprocesses the photo of a request. Raises InvalidImage."""
        config = self.captioner.preprocessing
        with self.metrics.timed("captioner_decode_seconds"):
            job.pixels_3SS = to_tensor(decode_resized(job.photo, config, patience), config)
            if job.as_picture:
                whole = decode(job.photo, patience)
                job.seen = seen_region(whole.size, config)
                # The photos of a batch wait for each other: none of them as it was decoded.
                job.image = shrunk(whole)

    def _caption(self, jobs: Sequence[Job], context: Any) -> list[Any]:
        """The answers to the requests of a batch, or their error bodies."""
        longest = self.captioner.decoder.max_positions - 1
        groups = searched_together(jobs, longest, self.max_beam_tokens)
        return [body for group in groups for body in self._caption_group(group, context)]

    def _caption_group(self, jobs: Sequence[Job], context: Any) -> list[Any]:
        stream = TokenStream(self.captioner, jobs, context)
        try:
            with self.metrics.timed("captioner_encode_seconds"):
                memory_BPD = self.captioner.encode(torch.stack([job.pixels_3SS for job in jobs]))
            with self.metrics.timed("captioner_search_seconds"):
                # A photo's memory is repeated for each of its prompts.
                rows = [number for number, job in enumerate(jobs) for _ in job.options]
                captions = self.captioner.caption_memory(
                    memory_BPD if len(rows) == len(jobs) else memory_BPD[rows],
                    [options for job in jobs for options in job.options],
                    stream.on_token if stream.jobs else None,
                )
        except Exception as error:
            # Each request is tried again alone, unless tokens of it have been sent already.
            if len(jobs) == 1:
                return [failure(error)]
            log.error("a batch of %d requests failed; each is tried again alone", len(jobs))
            return [
                failure(error) if job.index in stream.sent else self._caption([job], context)[0]
                for job in jobs
            ]
        answers: list[Any] = []
        tokens = []
        remaining = iter(captions)
        for job, memory_PD in zip(jobs, memory_BPD, strict=True):
            of_job = [next(remaining) for _ in job.options]
            try:
                answers.append(answer(self.captioner, job, memory_PD, of_job, self.model))
                tokens.append(sum(len(caption.tokens) for best in of_job for caption in best))
            except Exception as error:
                answers.append(failure(error))
        self.metrics.add("captioner_photos_total", len(tokens))
        self.metrics.add("captioner_tokens_total", sum(tokens))
        return answers

    def _finish(self, index: int, body: str | bytes | dict[str, Any], context: Any) -> str | bytes:
        """Sets the status and content type of an answer or an error (a dict); returns its body."""
        if isinstance(body, dict):
            phrase = PHRASES.get(body["code"], "Internal Server Error")
            context.set_response_status(code=body["code"], phrase=phrase, idx=index)
            self.metrics.add("captioner_errors_total", 1, body["type"])
            body = to_json(body)
        if not context.get_response_content_type(index):  # a stream has set its own
            kind = "image/png" if isinstance(body, bytes) else "application/json"
            context.set_response_content_type(index, kind)
        return body


def header(headers: Mapping[str, Any], name: str) -> str:
    """The value of a header, whose name may be in any case; empty if it is missing."""
    values = (value for key, value in headers.items() if key.lower() == name)
    return next((value for value in values if isinstance(value, str)), "")
