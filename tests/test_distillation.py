"""Distillation: the loss is that of the papers, teachers only teach, what does not fit is refused
before anything is lost, and what teachers write becomes a dataset."""

import copy
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run_program
from huggingface_models import save_florence
from safetensors.torch import load_file
from tiny_training import config_of

from handler.beam_search import DecodeOptions, SpecialIds, search
from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError, run_command
from handler.image_preprocess import PreprocessConfig
from training.checkpoint import load_captioner, load_model, save_checkpoint
from training.config import Distillation, SelfCritical, Stage, TokenizerChoice
from training.data.captions import Captions
from training.data.manifest import Row, read_manifest, write_manifest
from training.data.scenes import make_row
from training.distil_captions import main, with_captions
from training.loop.student import Student
from training.loop.teachers import ensemble_captioner, load_teachers
from training.loop.train import train
from training.model import CaptioningModel, DecoderConfig, EncoderConfig
from training.objectives.distillation import DistillationLoss
from training.objectives.ensemble import Ensemble
from training.objectives.objective import Objective
from training.weights.huggingface import import_huggingface

ROWS = [
    Row("0", "0.png", ("a red ball", "grass on the left of a ball"), "train"),
    Row("1", "1.png", ("a blue cat",), "train"),
    Row("2", "2.png", ("a cat on the grass",), "train"),
]
LONGEST = 6


def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train([c for row in ROWS for c in row.captions], "word", 100, 1)


def a_model(seed: int, width: int = 16, image_size: int = 16, dropout: float = 0.0):
    torch.manual_seed(seed)
    words = tokenizer().vocab_size
    model = CaptioningModel(
        EncoderConfig(width, 1, 2, 2 * width, image_size=image_size, patch_size=8),
        DecoderConfig(words, LONGEST, width, 2, 2, 2 * width, width, dropout=dropout),
    )
    # Far from uniform, so that distributions differ.
    model.decoder.token_embedding.weight.data.mul_(20)
    return model.eval()


def a_batch(images: torch.Tensor):
    return Captions(ROWS, tokenizer(), LONGEST).batch(images, [0, 1, 2], [False, True, False])


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def distil(student: CaptioningModel, teachers: list[CaptioningModel], **choice):
    """(loss a token, figures) of a batch of images."""
    batch = a_batch(IMAGES)
    loss = DistillationLoss(
        Distillation(("x",), **choice), Ensemble(teachers), smoothing=0.1, frozen=False
    )
    total, tokens, figures = loss(student.decoder, student.encoder(IMAGES), batch, 0)
    return total / tokens, figures


def test_the_loss_is_that_of_the_definition():
    """Word by word, in plain Python: label smoothing, the mean of two teachers, T and T^2."""
    student, teachers = a_model(0), [a_model(1), a_model(2, width=8)]
    loss, figures = distil(student, teachers, weight=0.3, temperature=2.0)
    batch = a_batch(IMAGES)

    def distributions(model: CaptioningModel, temperature: float) -> torch.Tensor:
        logits = model(IMAGES, batch.tokens, batch.positions, batch.mask)
        return (logits.double() / temperature).softmax(-1)

    with torch.no_grad():
        plain, soft = distributions(student, 1), distributions(student, 2)
        taught = sum(distributions(teacher, 2) for teacher in teachers) / 2
    truth = divergence = 0.0
    places = [
        (b, q) for b, row in enumerate(batch.targets.tolist()) for q, t in enumerate(row) if t >= 0
    ]
    assert len(places) == 4 + LONGEST + 4 + LONGEST
    for b, q in places:
        target, size = batch.targets[b, q].item(), plain.size(2)
        for word in range(size):
            wanted = 0.9 * (word == target) + 0.1 / size
            truth -= wanted * math.log(plain[b, q, word])
            p = taught[b, q, word].item()
            divergence += p * math.log(p / soft[b, q, word].item())
    truth, divergence = truth / len(places), 4 * divergence / len(places)
    assert loss.item() == pytest.approx(0.7 * truth + 0.3 * divergence, rel=1e-4)
    assert figures == {
        "cross_entropy": pytest.approx(truth, rel=1e-4),
        "divergence": pytest.approx(divergence, rel=1e-4),
    }


def test_only_the_student_learns():
    student, teacher = a_model(0, dropout=0.5).train(), a_model(1, dropout=0.5)
    before = copy.deepcopy(teacher.state_dict())
    loss = DistillationLoss(Distillation(("x",)), Ensemble([teacher]), 0.0, frozen=False)
    objective = Objective(student, loss, frozen=False)
    # DistributedDataParallel sees the student alone.
    assert len(list(objective.parameters())) == len(list(student.parameters()))
    total, tokens, _ = objective(a_batch(IMAGES), 0)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    (total / tokens).backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training
    assert all(torch.equal(before[name], w) for name, w in teacher.state_dict().items())


def test_a_hot_teacher_teaches_its_logits():
    """At a high temperature the gradient of a logit is (student - teacher) / words, logits without
    their means (Hinton et al. 2015, section 2.1): it does not vanish, for T^2 makes up for it."""
    teacher = a_model(1)
    batch = a_batch(IMAGES)
    logits_BQV = torch.randn(*batch.tokens.shape, teacher.decoder.vocab_size, requires_grad=True)
    loss = DistillationLoss(
        Distillation(("x",), weight=1.0, temperature=100.0), Ensemble([teacher]), 0.0, frozen=False
    )
    student = SimpleNamespace(
        hidden=lambda *inputs: logits_BQV[inputs[-1]], head=lambda logits_NV: logits_NV
    )
    total, _, _ = loss(student, torch.zeros(3, 1, 1), batch, 0)
    [gradient_BQV] = torch.autograd.grad(total, logits_BQV)
    taught_BQV = teacher(IMAGES, batch.tokens, batch.positions, batch.mask)
    apart_BQV = (logits_BQV - logits_BQV.mean(-1, True)) - (taught_BQV - taught_BQV.mean(-1, True))
    said = batch.targets >= 0
    expected = apart_BQV[said] / apart_BQV.size(2)
    assert (gradient_BQV[said] - expected).abs().max() < 0.1 * expected.abs().max()
    assert not gradient_BQV[~said].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_nothing_is_better_than_to_say_what_the_teachers_say(temperature):
    teacher = a_model(1)
    student = copy.deepcopy(teacher)
    loss, _ = distil(student, [teacher], weight=1.0, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-4
    for seed in range(5):
        other = copy.deepcopy(teacher)
        torch.manual_seed(seed)
        for parameter in other.decoder.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        assert distil(other, [teacher], weight=1.0, temperature=temperature)[0] > 1e-3


# Ensembles


def test_an_ensemble_searches_by_its_mean_distribution():
    """Members of different shapes, and photos that are done at different times: greedy captions are
    those of the mean distribution, computed without a cache, and beams score as it does."""
    models = [a_model(1), a_model(2, width=8), a_model(3, image_size=24)]
    # The same pixels cannot have two sizes in a run; here each takes its own.
    photos = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    ensemble = Ensemble(models)
    ensemble.encode = lambda images: [
        m.encoder(images[..., : m.encoder_config.image_size, : m.encoder_config.image_size])
        for m in models
    ]
    words = tokenizer()
    begin, end = words.begin_id, words.end_id

    def log_probs(photo: int, ids: list[int]) -> torch.Tensor:
        tokens = torch.tensor([[begin, *ids]])
        positions = torch.arange(tokens.size(1)).unsqueeze(0)
        mask = torch.ones(1, tokens.size(1), tokens.size(1), dtype=torch.bool).tril()
        found = [
            m.decoder(tokens, positions, mask, memory).softmax(-1)
            for m, memory in zip(models, ensemble.encode(photos[photo : photo + 1]), strict=True)
        ]
        return (sum(found) / 3).log()[0]

    with torch.inference_mode():
        memory = ensemble.encode_flat(photos)
        for beams in (1, 3):
            options = [DecodeOptions(num_beams=beams, max_new_tokens=n) for n in (2, 5, 3, 1, 4)]
            found = search(ensemble, memory, options, SpecialIds(begin, end))
            for photo, [best] in enumerate(found):
                ids = best.ids + [end] * best.finished
                logs = log_probs(photo, ids[:-1])
                said = [row[i].item() for row, i in zip(logs, ids, strict=True)]
                assert best.token_log_probs == pytest.approx(said, abs=1e-4)
                if beams == 1:
                    assert ids == logs.argmax(-1).tolist()


def test_members_share_an_encoder_that_they_have_in_common():
    one, other = a_model(1), a_model(2)
    third = copy.deepcopy(one)
    ensemble = Ensemble([one, other, third])
    assert (len(ensemble.encoders), ensemble.encoder_of) == (2, [0, 1, 0])


def test_an_ensemble_of_one_is_its_captioner(tiny_run, tiny_data):
    folder = tiny_run / "build/checkpoints/tiny"
    photos = [path.read_bytes() for path in sorted((tiny_data / "images").iterdir())[:6]]
    for folders, prompt in itertools.product(([folder], [folder, folder]), (None, "the square")):
        options = {"num_beams": 3, "num_return_sequences": 2, "prompt": prompt}
        alone = load_captioner(folder).caption(photos, **options)
        found = ensemble_captioner(folders).caption(photos, **options)
        for mine, theirs in zip(sum(found, []), sum(alone, []), strict=True):
            assert mine.text == theirs.text and mine.text.startswith(prompt or "")
            assert mine.score == pytest.approx(theirs.score, abs=1e-5)


# Runs

FROZEN = {"name": "frozen", "encoder": "frozen", "epochs": 1, "batch_photos": 8, "views": 2,
          "flip": True}  # fmt: skip


def test_a_smaller_student_learns_from_the_features_of_a_shared_encoder(
    tiny_data, tmp_path, monkeypatch
):
    """The same seed gives both the same encoder, which is never trained."""
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(tiny_data)
    teacher = config_of(tmp_path / "teacher.yaml", stages=[{**FROZEN, "epochs": 6}])
    train(teacher, manifest, Path("teacher"), None, resume=False)
    stage = {**FROZEN, "epochs": 12, "decoder_lr": 3e-3,
             "distillation": {"teachers": ["teacher"], "weight": 1.0}}  # fmt: skip
    small = {**TINY["decoder"], "width": 16, "dropout": 0.0}
    student = config_of(tmp_path / "student.yaml", decoder=small, stages=[stage])
    train(student, manifest, Path("student"), None, resume=False)
    sizes = [Path(name, "model.safetensors").stat().st_size for name in ("teacher", "student")]
    assert sizes[1] < 0.8 * sizes[0]
    log = [json.loads(line) for line in Path("student/metrics.jsonl").read_text().splitlines()]
    divergence = [line["divergence"] for line in log if "divergence" in line]
    assert divergence[-1] < 0.5 * divergence[0]


def test_a_student_may_have_its_teachers_encoder_and_features(
    tiny_run, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    teacher = tiny_run / "build/checkpoints/tiny"
    encoder = {"pretrained": f"checkpoint/{teacher}"}
    tokenizer = {"checkpoint": str(teacher)}
    stage = {**FROZEN, "epochs": 1, "distillation": {"teachers": [str(teacher)]}}
    for name, width in (("first", 16), ("second", 8)):
        small = {**TINY["decoder"], "width": width}
        config = config_of(
            Path("run.yaml"), encoder=encoder, tokenizer=tokenizer, decoder=small, stages=[stage]
        )
        train(config, read_manifest(tiny_data), Path(name), None, resume=False)
        assert len(list(Path("build/features").iterdir())) == 1
        theirs, ours = (load_file(f"{run}/model.safetensors") for run in (teacher, name))
        for parameter in (p for p in theirs if p.startswith("encoder.")):
            assert torch.equal(theirs[parameter], ours[parameter])


@pytest.fixture
def teacher(tiny_run, tmp_path, monkeypatch) -> Path:
    """A copy that may be spoilt, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run / "build/checkpoints/tiny", tmp_path / "teacher")
    return Path("teacher")


def spoil(teacher: Path, section: str, **fields: object) -> None:
    config = json.loads((teacher / "config.json").read_text())
    config[section] |= fields
    (teacher / "config.json").write_text(json.dumps(config))


def refusal(tiny_data: Path, stage: dict[str, object], **fields: object) -> str:
    """The line with which a run refuses its teacher; an earlier run of its name is still there."""
    run = Path("run")
    run.mkdir(exist_ok=True)
    (run / "train_state.pt").write_bytes(b"kept")
    choice = {"teachers": ["teacher"]}
    stage = {"name": "taught", "epochs": 1, "batch_photos": 8, "distillation": choice, **stage}
    config = config_of(Path("run.yaml"), **{"stages": [TINY["stages"][0], stage], **fields})
    with pytest.raises(UserError) as refused:
        train(config, read_manifest(tiny_data), run, None, overwrite=True)
    assert (run / "train_state.pt").read_bytes() == b"kept"
    return str(refused.value)


def test_teachers_that_do_not_fit_are_refused(teacher, tiny_data):
    fits = (teacher / "config.json").read_text()
    message = refusal(tiny_data, {}, tokenizer={"kind": "word", "min_count": 9})
    assert message.startswith("teacher/tokenizer.json: field 'model.vocab' is not that of the stud")
    assert "tokenizer.checkpoint" in message

    message = refusal(tiny_data, {}, decoder={**TINY["decoder"], "max_tokens": 11})
    assert "teacher/config.json: field 'model.decoder.max_positions' is 10" in message

    spoil(teacher, "preprocessing", std=[0.5, 0.4, 0.5])
    message = refusal(tiny_data, {})
    assert "teacher/config.json: field 'preprocessing.std' is [0.5, 0.4, 0.5]" in message

    (teacher / "config.json").write_text(fits)
    spoil(teacher, "tokenizer", end_id=3)
    message = refusal(tiny_data, {})
    assert "teacher/config.json: field 'tokenizer.end_id' is 3, the student has 2" in message

    message = refusal(tiny_data, {"distillation": {"teachers": ["nowhere"]}})
    assert message.startswith("nowhere: no config.json there")


def test_a_frozen_encoder_must_be_the_teachers_too(teacher, tiny_data):
    """Known at the start: a run once found hours later that an earlier stage had trained it."""
    stage = {"encoder": "frozen", "distillation": {"teachers": ["teacher"]}}
    whole = {**FROZEN, **stage, "name": "taught"}
    message = refusal(tiny_data, {}, stages=[whole])
    assert message.startswith("teacher/model.safetensors: the encoder's weights are not the stude")
    assert message.endswith("set encoder: trained in stage 'taught'")
    message = refusal(tiny_data, {}, stages=[whole], encoder={**TINY["encoder"], "layers": 2})
    assert message.startswith("teacher/config.json: field 'model.encoder.layers' is not")

    message = refusal(tiny_data, {}, stages=[{**TINY["stages"][0], "epochs": 1}, whole])
    assert "stage 'scratch' before it trains it; set encoder: trained in stage 'taught'" in message


def test_a_run_does_not_overwrite_its_teacher(teacher, tiny_data):
    for name in ("run", "run.previous"):
        shutil.copytree(teacher, name, dirs_exist_ok=True)
        message = refusal(tiny_data, {"distillation": {"teachers": [name]}})
        assert message.startswith(f"{name}: teacher of stage 'taught'")
        load_model(Path(name))


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: Distillation(()), "teachers must name at least one"),
        (lambda: Distillation(("x",), weight=0.0), "weight is a share above 0, to 1"),
        (lambda: Distillation(("x",), weight=1.1), "weight is a share above 0, to 1"),
        (lambda: Distillation(("x",), temperature=0.0), "temperature must be above 0"),
        (
            lambda: Stage("x", 1, distillation=Distillation(("x",)), self_critical=SelfCritical()),
            "make them two stages",
        ),
        (
            lambda: Stage("x", 1, distillation=Distillation(("x",), 1.0), label_smoothing=0.1),
            "which distillation.weight 1 leaves out",
        ),
        (
            lambda: TokenizerChoice(min_count=4, checkpoint="x"),
            "tokenizer.min_count is the one of tokenizer.checkpoint",
        ),
    ],
)
def test_contradictions_are_refused(make_wrong, message):
    with pytest.raises(UserError, match=message):
        make_wrong()


# What teachers write


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """6 + 3 scenes."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = []
    for split, count in (("train", 6), ("val", 3)):
        for number in range(count):
            row, picture = make_row(1, split, number)
            picture.save(folder / row.image)
            rows.append(row)
    write_manifest(folder, "drawn", rows, folder, [])
    return folder


def test_captions_of_teachers_join_those_of_people():
    said = {"0": ["a ball", "", "a ball"], "1": [""]}
    joined = [row.captions for row in with_captions(ROWS, said, replace=False)]
    assert joined == [(*ROWS[0].captions, "a ball"), ROWS[1].captions, ROWS[2].captions]
    replaced = [row.captions for row in with_captions(ROWS, said, replace=True)]
    assert replaced == [("a ball",), ROWS[1].captions, ROWS[2].captions]


@pytest.mark.parametrize("replace", [False, True])
def test_a_dataset_of_teachers_captions(tiny_run, drawn, tmp_path, replace):
    checkpoint = tiny_run / "build/checkpoints/tiny"
    options = ["--replace"] if replace else []
    done = run_program(
        "training.distil_captions", "--checkpoint", str(checkpoint), "--data", str(drawn),
        "--num-beams", "3", "--num-return-sequences", "2", *options, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6/6" in done.stderr
    assert done.stdout.startswith("build/data/drawn-distilled: 6 train, 3 val;")
    before = read_manifest(drawn)
    after = read_manifest(tmp_path / "build/data/drawn-distilled")
    assert after.name == "drawn-distilled"
    captioner = load_captioner(checkpoint)
    for old, new in zip(before.rows, after.rows, strict=True):
        assert before.path(old) == after.path(new)
        if old.split == "val":
            assert new == old
            continue
        photo = before.path(old).read_bytes()
        [best] = captioner.caption([photo], num_beams=3, num_return_sequences=2)
        taught = tuple(dict.fromkeys(caption.text for caption in best if caption.text))
        assert new == dataclasses.replace(old, captions=(() if replace else old.captions) + taught)
    dataset = json.loads((tmp_path / "build/data/drawn-distilled/dataset.json").read_text())
    assert dataset["teachers"] == [checkpoint.as_posix()]
    assert dataset["decoding"]["num_beams"] == 3


def test_faults_are_one_line_and_status_2(teacher, drawn, monkeypatch, capsys):
    model, config, _ = load_model(teacher)
    other = CaptionTokenizer.train(["other words altogether"], "word", 100, 1)
    save_checkpoint(Path("other"), model, other, config["preprocessing"], {}, {})
    before = (drawn / "captions.jsonl").read_bytes()
    for arguments, words in (
        (["--checkpoint", "teacher", "other"], "other/tokenizer.json: field 'model.vocab' is not"),
        (["--checkpoint", "teacher", "--out", str(drawn)], "the output is the input"),
        (["--checkpoint", "nowhere"], "nowhere: no config.json there"),
        (["--checkpoint", "teacher", "--num-beams", "99"], "num_beams must be"),
        ([], "--checkpoint"),
    ):
        command = ["training.distil_captions", *arguments, "--data", str(drawn)]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit, match="2"):
            run_command(main)
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line
    assert (drawn / "captions.jsonl").read_bytes() == before


def test_both_levels_go_together(teacher, tiny_data, monkeypatch):
    """Trained on what two teachers wrote, in their vocabulary, which those captions alone would not
    give, and on what they would say of it."""
    shutil.copytree(teacher, "second")
    arguments = ["--checkpoint", "teacher", "second", "--data", str(tiny_data), "--out", "taught"]
    monkeypatch.setattr("sys.argv", ["training.distil_captions", *arguments, "--replace"])
    main()
    stage = {"name": "x", "epochs": 1, "batch_photos": 8,
             "distillation": {"teachers": ["teacher", "second"]}}  # fmt: skip
    config = config_of(Path("x.yaml"), stages=[stage], tokenizer={"checkpoint": "teacher"})
    train(config, read_manifest(Path("taught")), Path("student"), None, resume=False)
    names = (Path("student"), teacher)
    assert len({(folder / "tokenizer.json").read_bytes() for folder in names}) == 1


@pytest.fixture(scope="module")
def florence(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("florence")
    save_florence(folder / "theirs")
    import_huggingface(str(folder / "theirs"), folder / "ours")
    return folder / "ours"


def test_a_florence_teaches_what_it_is_asked_for(florence, tiny_data):
    photos = [path.read_bytes() for path in sorted((tiny_data / "images").iterdir())[:2]]
    for prompt in (None, "<MORE_DETAILED_CAPTION>"):
        options = {"num_beams": 2, "max_new_tokens": 6, "prompt": prompt}
        alone = load_captioner(florence).caption(photos, **options)
        found = ensemble_captioner([florence]).caption(photos, **options)
        for mine, theirs in zip(sum(found, []), sum(alone, []), strict=True):
            assert mine.ids == theirs.ids
            assert mine.score == pytest.approx(theirs.score, abs=1e-5)


def test_a_florence_teaches_the_task_that_its_student_learns(florence, tmp_path):
    """Not the teacher's own default."""
    model, config, tokenizer = load_model(florence)
    learnt = tuple(tokenizer.tasks["<DETAILED_CAPTION>"]["ids"])
    shape = dataclasses.replace(model.decoder_config, prompt_ids=learnt)
    changed = CaptioningModel(model.encoder_config, shape)
    changed.load_state_dict(model.state_dict())
    preprocessing = PreprocessConfig.from_dict(config["preprocessing"])
    student = Student(
        changed.eval(), tokenizer, preprocessing, 20, torch.device("cpu"), (tmp_path / "run",)
    )
    stage = Stage("distilled", 1, distillation=Distillation([str(florence)], weight=1.0))
    ensemble = load_teachers(stage, student, shared_encoder=False)
    size = preprocessing.image_size
    with torch.inference_mode():
        image = torch.randn(1, 3, size, size)
        tokens, mask = torch.tensor([[tokenizer.begin_id]]), torch.ones(1, 1, 1, dtype=torch.bool)
        inputs = (tokens, torch.zeros_like(tokens), mask)
        expected = changed(image, *inputs).log_softmax(-1)
        found = ensemble.log_probs(*inputs, ensemble.encode(image))
        other = model.eval()(image, *inputs).log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (other - expected).abs().max() > 1e-3
