"""`python -m handler.client`, behind `make caption`: asks a running TorchServe for the captions of
one photo or of a whole folder, by REST or gRPC."""

import json
import random
from pathlib import Path
from typing import Any

from handler.attention_maps import is_overlay
from handler.client.connection import ServerError, add_server_options, client_of, read_file
from handler.client.folder import caption_folder, check_writable, write_alt_texts
from handler.errors import ArgumentParser, UserError, run_command
from handler.files import locked, write_atomic
from handler.request import add_decoding_options, given_options


def parse_arguments() -> Any:
    parser = ArgumentParser(prog="handler.client", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, metavar="FILE", help="a photo")
    what.add_argument("--images", type=Path, metavar="DIR", help="a folder of photos")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("captions.jsonl"),
        metavar="FILE",
        help="file for the captions of a folder; a photo that it already contains is captioned "
        "again only if the photo, the options or the server's checkpoint has changed",
    )
    parser.add_argument(
        "--alt-text",
        action="store_true",
        help="write each caption of a folder into its JPEG, PNG or WebP as alternative text (XMP); "
        "pixels do not change, and an existing alternative text is kept",
    )
    parser.add_argument("--grpc", action="store_true", help="use gRPC instead of REST")
    parser.add_argument("--json", action="store_true", help="print the whole JSON answer")
    parser.add_argument(
        "--attention", type=Path, metavar="PNG", help="write the photo with a heat map per word"
    )
    add_server_options(parser)
    add_decoding_options(parser, "server")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    client = client_of(arguments)
    ask = client.caption_grpc if arguments.grpc else client.caption
    # The server checks the ranges, because it knows the model.
    options = given_options(arguments)
    if arguments.images:
        if arguments.attention:
            raise UserError("--attention draws one photo; give --image instead of --images")
        check_writable(arguments.out)
        with locked(arguments.out):
            refused = caption_folder(ask, arguments.images, arguments.out, options)
            untagged = (
                write_alt_texts(arguments.images, arguments.out) if arguments.alt_text else []
            )
        if refused:
            raise UserError(
                f"{arguments.images}: {len(refused)} photos without a caption (listed above); "
                "repair or remove them and run again"
            )
        if untagged:
            raise UserError(
                f"{arguments.images}: {len(untagged)} photos could not store an alternative text "
                f"(listed above); their captions are in {arguments.out}"
            )
        return
    if arguments.alt_text:
        raise UserError("--alt-text is for a folder; give --images instead of --image")
    photo = read_file(arguments.image)
    if arguments.attention:
        check_writable(arguments.attention)
        present = read_file(arguments.attention) if arguments.attention.exists() else b""
        if present and not is_overlay(present):
            raise UserError(
                f"{arguments.attention}: this file is not a picture of word maps; give another path"
            )
    if arguments.attention and "do_sample" in options:
        # The picture is a second request, which must sample the same caption.
        options.setdefault("seed", str(random.randrange(2**31)))
    try:
        answer = ask(photo, **options)
        if arguments.attention:
            write_atomic(arguments.attention, client.picture(photo, **options))
    except ServerError as error:
        raise UserError(f"{arguments.image}: {error}") from error
    if arguments.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print("\n".join(caption["caption"] for caption in answer["captions"]))


if __name__ == "__main__":
    run_command(main)
