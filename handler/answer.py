"""Captions -> what the client gets: the answer, its picture, its stream of tokens, the model card,
the error."""

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor
from ts.handler_utils.utils import send_intermediate_predict_response

from handler.attention_maps import overlay, png_bytes
from handler.beam_search import OPTIONS, DecodeOptions, InvalidParameter, most_prompt_tokens
from handler.caption_tokenizer import PieceStream
from handler.captioner import Caption, Captioner, caption_as_dict, encode_prompt, written_prompt
from handler.image_preprocess import CheckedPhoto
from handler.request import Request, describe_error, to_json

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A request that was understood: its place in the batch, its photo, the options of each of its
    prompts, and whether a picture is the answer. Once the photo is decoded, it is there as the
    model sees it: as a picture, and as a tensor (3, S, S)."""

    place: int
    request: Request
    photo: CheckedPhoto
    options: Sequence[DecodeOptions]
    as_picture: bool
    image: Image.Image = field(init=False)
    pixels_3SS: Tensor = field(init=False)


class TokenStream:
    """Sends the tokens of the jobs that asked for them, one JSON line each, as they are decided."""

    def __init__(self, captioner: Captioner, jobs: Sequence[Job], context: Any) -> None:
        self.context = context
        # A job's row in the search -> its place among the requests, its text so far.
        self.jobs: dict[int, tuple[int, PieceStream]] = {}
        row = 0
        for job in jobs:
            if job.request.stream:
                prompt = encode_prompt(captioner.tokenizer, job.options[0].prompt)
                prompt = written_prompt(captioner.tokenizer, prompt)
                self.jobs[row] = job.place, PieceStream(captioner.tokenizer, prompt)
            row += len(job.options)

    def on_token(self, row: int, token_id: int) -> None:
        if row not in self.jobs:
            return
        place, pieces = self.jobs[row]
        self.context.set_response_content_type(place, "application/x-ndjson")
        send_intermediate_predict_response(
            {place: to_json({"token": pieces.add(token_id)}) + "\n"},
            {place: self.context.request_ids[place]},
            "ok",
            200,
            self.context,
        )


def answer(
    captioner: Captioner,
    job: Job,
    memory_PD: Tensor,
    found: Sequence[Sequence[Caption]],
    model: dict[str, str],
) -> str | bytes:
    """The body of an answer: JSON, or the PNG of its attention. `memory_PD` is the photo's, `found`
    the captions for each of its prompts."""
    if job.as_picture:
        best, memory_1PD = found[0][0], memory_PD.unsqueeze(0)
        [maps_Tgg] = captioner.attention_memory(memory_1PD, [best.ids], [best.prompt_ids])
        return png_bytes(overlay(job.image, best.tokens, maps_Tgg))
    entries = [_entry(captioner, job, memory_PD, captions) for captions in found]
    if job.request.prompts is None:
        body = {**entries[0], "model": model}
    else:
        prompts = zip(job.request.prompts, entries, strict=True)
        body = {"answers": [{"prompt": p, **entry} for p, entry in prompts], "model": model}
    return to_json(body) + ("\n" if job.request.stream else "")


def _entry(
    captioner: Captioner, job: Job, memory_PD: Tensor, captions: Sequence[Caption]
) -> dict[str, Any]:
    """The best caption and all of them, with their maps where they were asked for."""
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
    """What this model is and takes: for `?customized=true` of the management API."""
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
    """The answer to a request that failed; what is our own fault goes to the log."""
    said = describe_error(error)
    if said["code"] == 500:
        # As repr(), so that no line of the log begins with a client's text: TorchServe would take
        # "[METRICS]..." for a metric.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s: %r\n%s", type(error).__name__, str(error)[:500], frames)
    return said


def check_stream(options: DecodeOptions, grpc: bool, explain: bool) -> None:
    """Tokens can be sent only where each is final as soon as it is decided."""
    if grpc or explain:
        raise InvalidParameter("stream", "stream is for REST predictions alone; leave it out")
    if options.beams > 1 and not options.do_sample:
        raise InvalidParameter("stream", "stream needs num_beams 1, or do_sample true")
