"""Fields of pages and their forms, without gradio; the ranges are those that the ports' checks enforce."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from port_kit.errors import InputError, OptionalDependencyError
from port_kit.models.dreamid_omni import config as dreamid
from port_kit.models.mova import config as mova
from port_kit.models.ovi import config as ovi
from port_kit.models.wan.pipeline.request import LatentLengths
from port_kit.page import check_page
from port_kit.page.form import GENERAL, REFERENCES, bounded, form_of, page_fields, place_of
from port_kit.page.texts import note_html, progress_text, settings_html, settings_of
from port_kit.pipeline.prompt_request import parse_prompt_request
from port_kit.pipeline.request_fields import RequestField, request_fields
from port_kit.registry import find_port

LENGTHS = LatentLengths(31, 157)
PORTS = ("ovi", "dreamid_omni", "mova")


def parse(port: str, values: dict[str, Any]) -> Any:
    """Check a request as the port does, with values by name of field."""
    fields = {field.name: field for field in request_fields(find_port(port))}
    own = {name: value for name, value in values.items() if not fields[name].is_option}
    prompt = {"prompt": "rain", "negative_prompt": own.pop("negative_prompt", None)}
    usual = {"height": None, "width": None, "num_frames": None, "num_inference_steps": None, "seed": None}
    extra = {name: value for name, value in values.items() if fields[name].is_option}
    sampling = SimpleNamespace(
        **{**usual, "generator": None, "guidance_scale": 0.0, "num_outputs_per_prompt": 1, **own},
        guidance_scale_provided="guidance_scale" in own,
        extra_args=extra,
    )
    if port == "ovi":
        return ovi.parse_request(prompt, sampling, LENGTHS, ovi.CheckpointOptions(720 * 720, ovi.TAGS, 11, 30))
    if port == "dreamid_omni":
        media = {"image": ["a.png"], "audio": ["a.wav"]}
        return dreamid.parse_request({**prompt, "multi_modal_data": media}, sampling, LENGTHS)
    return parse_prompt_request(prompt, sampling, replace(mova.OPTIONS, images=0))


def together(field: RequestField, value: Any) -> dict[str, Any]:
    """Return a value with what it needs: both sides, and a window that is not empty."""
    others = {"width": {"height": value}, "height": {"width": value}, "slg_start": {"slg_stop": 1.0}}
    if field.name in ("width", "height") and value * value > 1_800_000:
        others[field.name] = {name: 352 for name in others[field.name]}
    return {**others.get(field.name, {}), field.name: value}


NUMBERS = [
    pytest.param(port, field, id=f"{port}-{field.name}")
    for port in PORTS
    for field in request_fields(find_port(port))
    if field.kind in ("int", "float")
]


@pytest.mark.parametrize(("port", "field"), NUMBERS)
def test_a_range_is_what_the_port_enforces(port: str, field: RequestField) -> None:
    step = 2 * field.multiple if field.kind == "int" else 0.001  # one frame stands for none
    for bound, beyond in ((field.minimum, -step), (field.maximum, step)):
        if bound is not None:
            value = int(bound) if field.kind == "int" else bound
            parse(port, together(field, value))
            with pytest.raises(InputError, match=field.name):
                parse(port, {**together(field, value), field.name: value + beyond})
    if field.multiple > 1:
        with pytest.raises(InputError, match=field.name):
            parse(port, {**together(field, int(field.minimum or 0)), field.name: int(field.minimum or 0) + 1})


@pytest.mark.parametrize("port", PORTS)
def test_the_defaults_are_those_of_a_request_without_values(port: str) -> None:
    fields = request_fields(find_port(port))
    given = {field.name: field.default for field in fields if field.default is not None}
    assert parse(port, given) == parse(port, {})


@pytest.mark.parametrize("port", PORTS)
def test_the_fields_are_options_that_servers_accept(port: str) -> None:
    declared = find_port(port)
    options = [field.name for field in request_fields(declared) if field.is_option]
    assert set(options) <= set(declared.option_names or ()) and set(declared.request_options) <= set(options)


def test_a_port_without_statements_has_the_fields_of_any_model() -> None:
    port = replace(find_port("mova"), package="elsewhere", request_options={"strength": "float", "style": "str"})
    fields = {field.name: field for field in request_fields(port)}
    assert {"width", "num_frames", "seed", "guidance_scale", "negative_prompt"} <= set(fields)
    assert (fields["strength"].kind, fields["style"].kind, fields["style"].is_option) == ("float", "text", True)
    assert fields["seed"].default == port.seed and fields["width"].default is None


def test_a_field_has_the_narrower_range_of_servers() -> None:
    ranges = {field.name: field.range_text for field in page_fields(find_port("mova"))}
    assert ranges["num_inference_steps"] == "1 to 200" and ranges["guidance_scale"] == "0 to 20"
    assert ranges["num_frames"] == "5 to 385, 1 and a multiple of 4" and ranges["seed"] == "0 or more"


OVI = page_fields(find_port("ovi"))
DEFAULTS = {field.name: field.default for field in OVI}


def test_a_form_leaves_defaults_to_the_model() -> None:
    assert form_of("rain", DEFAULTS, OVI) == {"prompt": "rain"}
    values = {**DEFAULTS, "seed": 5.0, "shift": 3, "solver_name": "euler", "slg_layer": "", "guidance_gate_step": "4"}
    form = form_of("rain", values, OVI)
    assert json.loads(form.pop("extra_params")) == {"shift": 3, "solver_name": "euler", "guidance_gate_step": 4}
    assert form == {"prompt": "rain", "seed": "5"}


def test_a_form_has_both_sides_or_none() -> None:
    assert form_of("rain", {**DEFAULTS, "width": 512}, OVI) == {"prompt": "rain", "width": "512", "height": "512"}
    assert form_of("rain", {**DEFAULTS, "width": 512, "height": None}, OVI) == {"prompt": "rain", "width": "512"}


def test_what_is_no_number_is_left_for_the_server() -> None:
    form = form_of("rain", {**DEFAULTS, "num_inference_steps": 1.5, "guidance_gate_step": "many"}, OVI)
    assert form["num_inference_steps"] == "1.5" and json.loads(form["extra_params"])["guidance_gate_step"] == "many"


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("[input_value] shift is 200; 0.01 or more and at most 100 is required\nhint: correct shift", "shift"),
        ("[input_missing] only height is given\nhint: give width and height, or neither", "height"),
        ("[input_size] size is '1x0'; WIDTHxHEIGHT without width and height is required", "width"),
        ("[input_missing] prompt is missing or blank\nhint: describe the scene in prompt", "prompt"),
        ("[input_value] reference image 1 is no audio file that this model reads", REFERENCES),
        ("[input_count] 2 images; at most one, the first frame, is accepted", REFERENCES),
        ("[input_count] 1 reference image(s) and 2 reference audio(s); equal numbers are required", REFERENCES),
        ("the engine has died", GENERAL),
        ("", GENERAL),
    ],
)
def test_an_error_has_a_place(message: str, place: str) -> None:
    assert place_of(message, OVI) == place


def test_errors_are_bounded_and_escaped() -> None:
    assert len(bounded("x" * 10_000)) < 1600 and bounded("short\nhint: y") == "short\nhint: y"
    assert "<script>" not in note_html("<script>alert(1)</script>", "error")
    assert "<b>" not in settings_html({"<b>": "<b>"})


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"status": "queued", "queue_position": 2, "step": None}, "Waiting for 2 other requests · 9 s so far"),
        ({"status": "queued"}, "Waiting · 9 s so far"),
        ({"status": "in_progress", "progress": 0}, "Running · 9 s so far"),
        (
            {"status": "in_progress", "queue_position": 0, "step": 3, "steps": 4, "remaining_seconds": 61.2},
            "Step 3 of 4 · about 1 min 1 s left · 9 s so far",
        ),
        ({"status": "in_progress", "step": 4, "steps": 4, "remaining_seconds": None}, "Decoding · 9 s so far"),
    ],
)
def test_progress_is_one_line(record: dict[str, Any], text: str) -> None:
    assert progress_text(record, 9.2) == text


def test_settings_are_those_of_the_record_and_of_the_request() -> None:
    record = {"seed": 3, "num_inference_steps": 4, "seconds": "5.04", "size": None, "model": "/models/tiny"}
    form = {"prompt": "rain", "seed": "3", "width": "96", "height": "64", "extra_params": '{"shift": 3}'}
    found = settings_of(record, form, 12.4)
    assert found == {
        "seed": "3", "steps": "4", "seconds": "5.04", "model": "tiny", "size": "96x64", "shift": "3", "made in": "12 s",
        "prompt": "rain",
    }  # fmt: skip


def test_a_page_needs_gradio_and_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[[str], Any] = {"gradio": object()}.get
    monkeypatch.setattr("importlib.util.find_spec", found)
    check_page(find_port("ovi"))
    with pytest.raises(InputError, match="pages are for ports that make videos"):
        check_page(replace(find_port("ovi"), output_type="image"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionalDependencyError) as caught:
        check_page(find_port("ovi"))
    assert "pip install 'port-kit[page]'" in caught.value.hint
