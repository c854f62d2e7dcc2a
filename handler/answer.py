"""What a client receives: the JSON answer, the picture, the stream of tokens, the model card, and
the error body."""

import logging
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor
from ts.handler_utils.utils import send_intermediate_predict_response

from handler.attention_maps import overlay, png_bytes
from handler.beam_search import OPTIONS, DecodeOptions, InvalidParameter, most_prompt_tokens
from handler.caption_tokenizer import PieceStream
from handler.captioner import (
    MAX_PROMPTS,
    Caption,
    Captioner,
    caption_as_dict,
    encode_prompt,
    written_prompt,
)
from handler.image_preprocess import CheckedPhoto
from handler.image_resize import Box
from handler.request import Request, describe_error, to_json
from handler.words import words_of

log = logging.getLogger(__name__)

# Numbers in the attention maps of an answer, each of at most 13 bytes: TorchServe restarts a worker
# whose answer is above its `max_response_size` (24 MiB here), and all requests of the batch fail.
MAX_MAP_VALUES = 1_500_000


@dataclass
class Job:
    """A valid request: its index in the batch, its photo, the options of each of its prompts, and
    whether the answer is a picture. Decoding the photo sets `pixels_3SS`, the model's input
    (3, S, S), and for a picture `image`, the photo of the size in which it is drawn, and `seen`,
    the region of it that is the model's input."""

    index: int
    request: Request
    photo: CheckedPhoto
    options: Sequence[DecodeOptions]
    as_picture: bool
    image: Image.Image = field(init=False)
    seen: Box = field(init=False)
    pixels_3SS: Tensor = field(init=False)


def searched_together(
    jobs: Sequence[Job], positions: int, max_beam_tokens: int
) -> Iterator[list[Job]]:
    """The jobs of a batch in groups whose searches fit in memory together: `max_beam_tokens` for
    the keys and values of their tokens, as for one request, and one photo a job or MAX_PROMPTS for
    those of the photos, which are repeated for each prompt."""
    group: list[Job] = []
    tokens = rows = 0
    for job in jobs:
        own = sum(o.rows * (o.max_new_tokens or positions) for o in job.options)
        too_many = rows + len(job.options) > max(MAX_PROMPTS, len(group) + 1)
        if group and (tokens + own > max_beam_tokens or too_many):
            yield group
            group, tokens, rows = [], 0, 0
        group.append(job)
        tokens, rows = tokens + own, rows + len(job.options)
    if group:
        yield group


class TokenStream:
    """Sends the tokens of jobs with `stream`, one JSON line each, as soon as they are final."""

    def __init__(self, captioner: Captioner, jobs: Sequence[Job], context: Any) -> None:
        self.context = context
        # A job's row in the search -> its index among the requests, and its text so far.
        self.jobs: dict[int, tuple[int, PieceStream]] = {}
        self.sent: set[int] = set()  # the requests of which tokens have been sent
        row = 0
        for job in jobs:
            if job.request.stream:
                prompt = encode_prompt(captioner.tokenizer, job.options[0].prompt)
                prompt = written_prompt(captioner.tokenizer, prompt)
                self.jobs[row] = job.index, PieceStream(captioner.tokenizer, prompt)
            row += len(job.options)

    def on_token(self, row: int, token_id: int) -> None:
        if row not in self.jobs:
            return
        index, pieces = self.jobs[row]
        self.sent.add(index)
        self.context.set_response_content_type(index, "application/x-ndjson")
        send_intermediate_predict_response(
            {index: to_json({"token": pieces.add(token_id)}) + "\n"},
            {index: self.context.request_ids[index]},
            "ok",
            200,
            self.context,
        )


def answer(
    captioner: Captioner,
    job: Job,
    memory_PD: Tensor,
    captions: Sequence[Sequence[Caption]],
    model: dict[str, str],
) -> str | bytes:
    """The body of an answer: JSON, or a PNG of the attention maps. `memory_PD` is the photo's
    memory, `captions` contains the captions for each of its prompts."""
    if job.as_picture:
        best, memory_1PD = captions[0][0], memory_PD.unsqueeze(0)
        [maps_Tgg] = captioner.attention_memory(memory_1PD, [best.ids], [best.prompt_ids])
        words = words_of(best.tokens, best.token_log_probs, maps_Tgg)
        return png_bytes(overlay(job.image, words, job.seen))
    if job.request.attention:
        tokens = sum(len(caption.ids) for best in captions for caption in best)
        values = tokens * captioner.grid**2
        if values > MAX_MAP_VALUES:
            raise InvalidParameter(
                "attention",
                f"attention: the maps of all tokens of these captions have {values} numbers, an "
                f"answer at most {MAX_MAP_VALUES}; ask for fewer captions or tokens",
            )
    entries = [_entry(captioner, job, memory_PD, for_prompt) for for_prompt in captions]
    if job.request.prompts is None:
        body = {**entries[0], "model": model}
    else:
        prompts = zip(job.request.prompts, entries, strict=True)
        body = {"answers": [{"prompt": p, **entry} for p, entry in prompts], "model": model}
    return to_json(body) + ("\n" if job.request.stream else "")


def _entry(
    captioner: Captioner, job: Job, memory_PD: Tensor, captions: Sequence[Caption]
) -> dict[str, Any]:
    """The best caption and the list of all captions, with attention maps if the request has
    `attention`."""
    entries = [caption_as_dict(caption) for caption in captions]
    if job.request.attention:
        memory_NPD = memory_PD.expand(len(captions), -1, -1)
        maps = captioner.attention_memory(
            memory_NPD, [c.ids for c in captions], [c.prompt_ids for c in captions]
        )
        for entry, maps_Tgg in zip(entries, maps, strict=True):
            rows = [[round(weight, 8) for weight in row] for row in maps_Tgg.flatten(1).tolist()]
            entry["attention"] = {"grid": list(maps_Tgg.shape[1:]), "maps": rows}
    return {"caption": captions[0].text, "captions": entries}


def model_card(captioner: Captioner, model: dict[str, str], max_beam_tokens: int) -> str:
    """Describes the model and its options, for `?customized=true` of the management API."""
    decoder, defaults = captioner.decoder, captioner.options()
    sizes = {"positions": decoder.max_positions - 1, "vocabulary": decoder.vocab_size}
    sizes["half"] = most_prompt_tokens(decoder.max_positions)
    unset = {"num_beams": defaults.beams, "max_new_tokens": sizes["positions"]}
    options = {}
    for name, option in OPTIONS.items():
        default = getattr(defaults, name)
        default = unset.get(name) if default is None else default
        options[name] = {"default": default, "range": option.range(sizes)}
    card = {
        "model": model,
        "options": options,
        "max_beam_tokens": max_beam_tokens,
        "preprocessing": captioner.preprocessing.to_dict(),
        "validation": captioner.config.get("training", {}).get("validation", {}),
    }
    return to_json(card)


def failure(error: Exception) -> dict[str, Any]:
    """The error body for a failed request. Internal errors are logged."""
    error_body = describe_error(error)
    if error_body["code"] == 500:
        # repr() keeps a client's text on one line: TorchServe parses lines of the log that begin
        # with "[METRICS]" as metrics.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s: %r\n%s", type(error).__name__, str(error)[:500], frames)
    return error_body


def check_stream(options: DecodeOptions, grpc: bool, explain: bool) -> None:
    """Raises InvalidParameter unless each token is final when it is decoded, and the request is a
    REST prediction."""
    if grpc or explain:
        raise InvalidParameter("stream", "only REST predictions support stream; leave it out")
    if options.beams > 1 and not options.do_sample:
        raise InvalidParameter("stream", "stream needs num_beams 1, or do_sample true")
