"""The class that TorchServe loads. What a request means is decided in `handler.request`, what a
photo shows in `handler.captioner`, how it is said in `handler.answer`."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from handler.answer import Job, TokenStream, answer, check_stream, failure, model_card
from handler.beam_search import InvalidParameter
from handler.captioner import Captioner, prompted
from handler.image_preprocess import Patience, check, decode_resized, to_tensor
from handler.request import HandlerSettings, parse_request, to_json, within
from handler.server_metrics import ServerMetrics

log = logging.getLogger(__name__)

# The status line must be plain ASCII without line feeds: anything else kills the worker.
PHRASES = {400: "Bad Request", 413: "Payload Too Large", 415: "Unsupported Media Type"}


class CaptionHandler:
    """Captions a batch of requests; a bad one never touches its neighbours."""

    def initialize(self, context: Any) -> None:
        """Loads the export in the archive's folder. `handler:` in `model-config.yaml`
        sets `threads` (of torch), `decoding` (defaults below the checkpoint's own) and
        `max_beam_tokens` (see `handler.request.HandlerSettings`)."""
        # TorchServe would decode JSON bodies itself, whatever they hold: see parse_json().
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        settings = HandlerSettings.read((context.model_yaml_config or {}).get("handler"))
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        self.captioner = Captioner.load(
            Path(properties["model_dir"]),
            device=f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu",
            threads=settings.threads,
        )
        self.captioner.decoding = {**settings.decoding, **self.captioner.decoding}
        self.max_beam_tokens = settings.max_beam_tokens
        manifest, config = context.manifest["model"], self.captioner.config
        self.model = {
            "name": manifest["modelName"],
            "version": manifest["modelVersion"],
            "checkpoint": config["checkpoint"],
            "precision": config["precision"],
        }
        self.metrics = ServerMetrics(context.metrics, self.model["name"])
        # A bad default or a model that cannot caption is an error now, not in every request; and
        # the first client does not wait for TorchScript's first run.
        self.captioner.caption([Image.new("RGB", (32, 32))])

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str | bytes]:
        """One answer for each request, in order."""
        answers: dict[int, Any] = {}
        understood = []
        for place, fields in enumerate(data):
            try:
                headers = context.get_all_request_header(place)
                # gRPC has no headers; what stands here then is the content type of each field.
                grpc = all(isinstance(value, dict) for value in headers.values())
                if grpc:
                    # Ends a StreamPredictions call, which otherwise waits for more until the
                    # worker is taken for dead.
                    context.set_response_header(place, "ts_stream_next", "false")
                if not fields and header(headers, "describe"):
                    # From the management API; a client's own "describe" header comes with a body.
                    answers[place] = model_card(self.captioner, self.model, self.max_beam_tokens)
                else:
                    understood.append(self._understand(place, fields, headers, grpc))
            except Exception as error:
                answers[place] = failure(error)
        patience = Patience()
        # Ordinary photos first: a slow one leaves less time to those that come after it.
        for job in sorted(understood, key=lambda job: (job.photo.effort, len(job.photo.data))):
            try:
                self._decode(job, patience)
            except Exception as error:
                answers[job.place] = failure(error)
        jobs = [job for job in understood if job.place not in answers]
        for job, said in zip(jobs, self._caption(jobs, context), strict=True):
            answers[job.place] = said
        if data != [{}]:  # as a description comes
            self.metrics.add("captioner_batch_size", len(data))
        return [self._finish(place, answers[place], context) for place in range(len(data))]

    def _understand(
        self, place: int, fields: dict[str, Any], headers: Mapping[str, Any], grpc: bool
    ) -> Job:
        """Parses and checks one request. Raises what the client did wrong."""
        request = parse_request(fields, header(headers, "content-type"))
        given = [request.options]
        if request.prompts is not None:
            given = prompted(request.options, request.prompts)
        asked = "max_new_tokens" in request.options
        longest = self.captioner.decoder.max_positions - 1
        most = self.max_beam_tokens // len(given)
        options = [within(self.captioner.options(**o), longest, most, asked) for o in given]
        explain = not grpc and header(headers, "explain") == "True"
        as_picture = explain and "image/png" in header(headers, "accept").lower()
        if request.stream:
            check_stream(options[0], grpc, explain)
        if request.prompts is not None and (request.stream or as_picture):
            raise InvalidParameter(
                "prompts", "a stream and a picture are of one prompt; give prompt instead"
            )
        request.attention = request.attention or explain
        return Job(place, request, check(request.photo), options, as_picture)

    def _decode(self, job: Job, patience: Patience) -> None:
        """Decodes and preprocesses the photo of a request. Raises InvalidImage."""
        config = self.captioner.preprocessing
        with self.metrics.timed("captioner_decode_seconds"):
            job.image = decode_resized(job.photo, config, patience)
            job.pixels_3SS = to_tensor(job.image, config)

    def _caption(self, jobs: Sequence[Job], context: Any) -> list[Any]:
        """The answers of the requests that share a batch."""
        if not jobs:
            return []
        stream = TokenStream(self.captioner, jobs, context)
        try:
            with self.metrics.timed("captioner_encode_seconds"):
                memory_BPD = self.captioner.encode(torch.stack([job.pixels_3SS for job in jobs]))
            with self.metrics.timed("captioner_search_seconds"):
                # A photo once for each of its prompts.
                rows = [number for number, job in enumerate(jobs) for _ in job.options]
                captions = self.captioner.caption_memory(
                    memory_BPD if len(rows) == len(jobs) else memory_BPD[rows],
                    [options for job in jobs for options in job.options],
                    stream.on_token if stream.jobs else None,
                )
        except Exception as error:
            # What fails together may succeed alone; what has sent tokens cannot start again.
            if len(jobs) == 1 or stream.jobs:
                return [failure(error) for _ in jobs]
            log.error("a batch of %d failed; each goes alone now", len(jobs))
            return [said for job in jobs for said in self._caption([job], context)]
        answers: list[Any] = []
        tokens = []
        rest = iter(captions)
        for job, memory_PD in zip(jobs, memory_BPD, strict=True):
            found = [next(rest) for _ in job.options]
            try:
                answers.append(answer(self.captioner, job, memory_PD, found, self.model))
                tokens.append(sum(len(caption.tokens) for best in found for caption in best))
            except Exception as error:
                answers.append(failure(error))
        self.metrics.add("captioner_photos_total", len(tokens))
        self.metrics.add("captioner_tokens_total", sum(tokens))
        return answers

    def _finish(self, place: int, said: str | bytes | dict[str, Any], context: Any) -> str | bytes:
        """Sets status and content type of an answer, or of an error (a dict); returns the body."""
        if isinstance(said, dict):
            phrase = PHRASES.get(said["code"], "Internal Server Error")
            context.set_response_status(code=said["code"], phrase=phrase, idx=place)
            self.metrics.add("captioner_errors_total", 1, said["type"])
            said = to_json(said)
        if not context.get_response_content_type(place):  # a stream has told its own
            kind = "image/png" if isinstance(said, bytes) else "application/json"
            context.set_response_content_type(place, kind)
        return said


def header(headers: Mapping[str, Any], name: str) -> str:
    """A header's value, its name in any case; empty where there is none."""
    found = (value for key, value in headers.items() if key.lower() == name)
    return next((value for value in found if isinstance(value, str)), "")
