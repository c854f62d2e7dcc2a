"""The class that TorchServe loads. What a request means is decided in `handler.request`, what a
photo shows in `handler.captioner`; here one is handed to the other."""

import logging
from pathlib import Path
from typing import Any

import torch
from ts.handler_utils.utils import send_intermediate_predict_response

from handler.attention_maps import overlay, png_bytes
from handler.beam_search import DecodeOptions, InvalidParameter
from handler.captioner import Captioner, caption_as_dict
from handler.image_preprocess import decode, resize
from handler.request import OPTION_TYPES, describe_error, parse_request, to_json

log = logging.getLogger(__name__)

# The status line must be plain ASCII without line feeds: anything else kills the worker.
PHRASES = {400: "Bad Request", 413: "Payload Too Large", 415: "Unsupported Media Type"}


class CaptionHandler:
    """Captions a batch of requests; a bad one never touches its neighbours."""

    def initialize(self, context: Any) -> None:
        """Loads the export that lies in the archive's folder. `handler:` in `model-config.yaml`
        sets `threads` (of torch) and `decoding` (defaults below the checkpoint's own)."""
        settings = (context.model_yaml_config or {}).get("handler", {})
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        device = "cpu"
        if torch.cuda.is_available() and gpu is not None:
            device = f"cuda:{gpu}"
        self.captioner = Captioner.load(
            Path(properties["model_dir"]), device=device, threads=settings.get("threads")
        )
        self.captioner.decoding = {**settings.get("decoding", {}), **self.captioner.decoding}
        self.captioner.options()  # a bad default is an error at start, not in every request
        manifest = context.manifest["model"]
        self.model = {
            "name": manifest["modelName"],
            "version": manifest["modelVersion"],
            "checkpoint": self.captioner.config["checkpoint"],
            "precision": self.captioner.config["precision"],
        }

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """One answer for each request, in order."""
        answers: list[Any] = [None] * len(data)
        headers = [context.get_all_request_header(i) for i in range(len(data))]
        pending = []
        for i, fields in enumerate(data):
            if _header(headers[i], "describe") == "True":
                answers[i] = self.describe()
                continue
            # gRPC's headers arrive as a dict of dicts.
            grpc = bool(headers[i]) and all(isinstance(v, dict) for v in headers[i].values())
            if grpc:
                # Closes the answer of a StreamPredictions call, which waits for more otherwise.
                context.set_response_header(i, "ts_stream_next", "false")
            try:
                photo, given, flags = parse_request(fields)
                options = self.captioner.options(**given)
                options.limits(
                    self.captioner.decoder.vocab_size, self.captioner.decoder.max_positions
                )
                if flags["stream"]:
                    _check_stream(options, grpc)
                size = self.captioner.preprocessing.image_size
                image = resize(decode(photo, 2 * size), self.captioner.preprocessing)
                flags["explain"] = _header(headers[i], "explain") == "True"
                pending.append((i, image, options, flags))
            except Exception as error:
                answers[i] = self._failed(error)
        if pending:
            self._caption(pending, answers, headers, context)
        for i, answer in enumerate(answers):
            if isinstance(answer, bytes):
                context.set_response_content_type(i, "image/png")
                continue
            code = answer.get("code", 200)
            if code != 200:
                context.set_response_status(
                    code=code, phrase=PHRASES.get(code, "Internal Server Error"), idx=i
                )
            context.set_response_content_type(i, "application/json")
            answers[i] = to_json(answer)
        return answers

    def _caption(
        self,
        pending: list[tuple[int, Any, DecodeOptions, dict[str, bool]]],
        answers: list[Any],
        headers: list[Any],
        context: Any,
    ) -> None:
        streams = {number: entry[0] for number, entry in enumerate(pending) if entry[3]["stream"]}
        text: dict[int, list[int]] = {number: [] for number in streams}

        def on_token(number: int, token: int) -> None:
            if number not in streams:
                return
            text[number].append(token)
            piece = self.captioner.tokenizer.pieces(text[number])[-1]
            i = streams[number]
            send_intermediate_predict_response(
                {i: to_json({"token": piece}) + "\n"},
                {i: context.request_ids[i]},
                "ok",
                200,
                context,
            )

        try:
            images = torch.stack([self.captioner.preprocess(entry[1]) for entry in pending])
            found = self.captioner.caption_tensors(
                images, [entry[2] for entry in pending], on_token if streams else None
            )
        except Exception as error:
            for i, *_ in pending:
                answers[i] = self._failed(error)
            return
        for (i, image, _, flags), tensor, captions in zip(pending, images, found, strict=True):
            try:
                answers[i] = self._answer(image, tensor, captions, flags, headers[i])
            except Exception as error:
                answers[i] = self._failed(error)

    def _answer(
        self, image: Any, tensor: torch.Tensor, captions: Any, flags: dict[str, bool], header: Any
    ) -> Any:
        answer = {
            "caption": captions[0].text,
            "captions": [caption_as_dict(caption) for caption in captions],
            "model": self.model,
        }
        if flags["explain"] and "image/png" in (_header(header, "accept") or ""):
            maps = self.captioner.attention(tensor, captions[0].ids)
            return png_bytes(overlay(image, captions[0].tokens, maps))
        if flags["attention"] or flags["explain"]:
            for entry, caption in zip(answer["captions"], captions, strict=True):
                maps = self.captioner.attention(tensor, caption.ids)
                entry["attention"] = {
                    "grid": list(maps.shape[1:]),
                    "maps": maps.flatten(1).tolist(),
                }
        return answer

    def describe(self) -> dict[str, Any]:
        """The model card."""
        config = self.captioner.config
        return {
            "model": self.model,
            "options": {name: getattr(self.captioner.options(), name) for name in OPTION_TYPES},
            "preprocessing": config["preprocessing"],
            "validation": config.get("training", {}).get("validation", {}),
        }

    @staticmethod
    def _failed(error: Exception) -> dict[str, Any]:
        answer = describe_error(error)
        if answer["code"] == 500:
            # The trace goes to the server's own log; it holds none of the client's content.
            log.error("a request failed: %s", type(error).__name__, exc_info=error)
        return answer


def _check_stream(options: DecodeOptions, grpc: bool) -> None:
    if grpc:
        raise InvalidParameter("stream", "stream is answered over REST alone; leave it out")
    if options.num_return_sequences > 1 or (options.beams > 1 and not options.do_sample):
        raise InvalidParameter(
            "stream", "stream needs num_beams 1 or do_sample, and one returned sequence"
        )


def _header(header: Any, name: str) -> str | None:
    for key, value in (header or {}).items():
        if key.lower() == name and isinstance(value, str):
            return value
    return None
