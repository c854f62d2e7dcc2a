"""One TorchServe serves a tiny model of each family in turn: imported, exported, archived,
registered instead of the one before, and asked by REST and gRPC, with and without a prompt."""

import io

import pytest
from huggingface_models import save_family
from live import client_of, configure, serve_instead
from test_families import PHOTOS, PROMPTS, generate

from export.archive import build_archive
from export.export import export_checkpoint
from handler.serve import server as serve
from training.weights.huggingface import import_huggingface

pytestmark = [pytest.mark.live, pytest.mark.slow]
NAMES = ("vit+gpt2", "blip", "git")
OPTIONS = {"num_beams": 3, "max_new_tokens": 9, "early_stopping": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with an archive of each family, the first of which the server starts with."""
    folder = tmp_path_factory.mktemp("server")
    models = {}
    for name in NAMES:
        models[name] = save_family(folder / name / "theirs", name)
        import_huggingface(str(folder / name / "theirs"), folder / name / "ours")
        export_checkpoint(folder / name / "ours", folder / name / "export")
        archive = folder / f"model_store/{name}.mar"
        build_archive(folder / name / "export", archive, "1.0")
    configure(folder, enable_model_api="true", load_models=f"captioner={NAMES[0]}.mar")
    return folder, models


def test_one_server_serves_each_family_in_turn(home):
    folder, models = home
    photos = []
    for photo in PHOTOS:
        file = io.BytesIO()
        photo.save(file, "PNG")
        photos.append(file.getvalue())
    server = serve.start(folder / "config.properties", home=folder)
    try:
        client = client_of(server, folder)
        for name in NAMES:
            if name != NAMES[0]:
                serve_instead(server, folder, f"{name}.mar")
            model, tokenizer, processor = models[name]
            for prompt in PROMPTS:
                sequences, _, scores = generate(model, processor, tokenizer, prompt, **OPTIONS)
                texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
                asked = {**OPTIONS, "early_stopping": "false"}
                if prompt is not None:
                    asked["prompt"] = prompt
                for photo, text, score in zip(photos, texts, scores, strict=True):
                    for ask in (client.caption, client.caption_grpc):
                        answer = ask(photo, **asked)
                        assert answer["caption"] == text.strip()
                        assert answer["captions"][0]["score"] == pytest.approx(score, abs=2e-4)
    finally:
        serve.stop(folder)
