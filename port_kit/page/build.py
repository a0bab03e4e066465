"""The page, built by gradio from the fields of a port."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from port_kit.page.client import JobClient, JobError, Upload
from port_kit.page.form import GENERAL, PROMPT, REFERENCES, form_of, page_fields, place_of
from port_kit.page.run_job import Clip, Progress, run_job
from port_kit.page.texts import caption_of, note_html, progress_html, settings_html
from port_kit.pipeline.request_fields import RequestField
from port_kit.port import Port

#: Clips of a session in the gallery.
MAX_CLIPS = 12
#: References of a port that takes several: rows of one image and one audio, of which the first are shown at once.
ROWS, FIRST_ROWS = 6, 2
#: Seconds between two looks at the server.
SERVER_SECONDS = 10
IMAGES, AUDIOS = [".png", ".jpg", ".jpeg", ".webp"], [".wav", ".mp3", ".flac", ".ogg", ".m4a", ".mp4"]
_HIGHEST_SEED = 2**31 - 1
_LABELS = {"num_inference_steps": "Steps", "num_frames": "Frames"}

Updates = dict[Any, Any]


class Page:
    """Components of the page of one port, and what they do.

    Args:
        port: the port.
        client: of the server.
        folder: for clips; whoever starts the page deletes it.
    """

    def __init__(self, port: Port, client: JobClient, folder: Path) -> None:
        self._port = port
        self._client = client
        self._folder = folder
        self._fields = page_fields(port)
        self._inputs: dict[str, Any] = {}
        self._references: list[Any] = []
        self._errors: dict[str, Any] = {}
        self._accordion: Any = None

    def build(self) -> gr.Blocks:
        """Return the page."""
        with gr.Blocks(title=self._port.title, analytics_enabled=False, fill_width=True) as blocks:
            with gr.Column(elem_id="pk-title"):
                gr.Markdown(f"# {self._port.title.partition(':')[0]}\n\n{self._port.title.partition(': ')[2]}")
            self._server = gr.HTML(elem_id="pk-server")
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=380):
                    self._build_request()
                with gr.Column(scale=6, min_width=420):
                    self._build_result()
            self._connect(blocks)
        return blocks

    # -- components -------------------------------------------------------------------------------------------------

    def _build_request(self) -> None:
        prompt = gr.Textbox(label="Prompt", value=self._port.example_prompt, lines=4, max_lines=12, elem_id="pk-prompt")
        self._inputs[PROMPT] = prompt
        self._add_error(PROMPT)
        if self._port.references:
            self._build_references()
        plain = [field for field in self._fields if field.kind != "text" and not field.is_option]
        texts = [field for field in self._fields if field.kind == "text" and not field.is_option]
        options = [field for field in self._fields if field.is_option]
        self._build_fields(plain)
        self._build_fields(texts)
        if options:
            with gr.Accordion("Options of the model", open=False, elem_id="pk-options") as self._accordion:
                self._build_fields([field for field in options if field.kind != "text"])
                self._build_fields([field for field in options if field.kind == "text"])
        with gr.Row():
            self._generate = gr.Button("Generate", variant="primary", scale=3, elem_id="pk-generate")
            self._cancel = gr.Button("Cancel", variant="stop", scale=1, interactive=False, elem_id="pk-cancel")
        self._add_error(GENERAL)

    def _build_references(self) -> None:
        if self._port.references == ("image",):
            label = "First frame" if self._port.first_frame else "Reference image"
            self._references = [self._image(label, 180)]
        else:
            for row in range(FIRST_ROWS):
                self._build_row(row)
            with gr.Accordion("More references", open=False):
                for row in range(FIRST_ROWS, ROWS):
                    self._build_row(row)
        self._add_error(REFERENCES)

    def _build_row(self, row: int) -> None:
        with gr.Row():
            if "image" in self._port.references:
                self._references.append(self._image(f"Image {row + 1}", 160))
            if "audio" in self._port.references:
                name = f"pk-audio-{len(self._references)}"
                self._references.append(
                    gr.Audio(label=f"Audio {row + 1}", type="filepath", sources=["upload", "microphone"], elem_id=name)
                )

    def _image(self, label: str, height: int) -> Any:
        # without a mode, the file is passed on as it is
        name = f"pk-image-{len(self._references)}"
        return gr.Image(
            label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=height, elem_id=name
        )

    def _build_fields(self, fields: Sequence[RequestField]) -> None:
        with gr.Row():
            for field in fields:
                with gr.Column(min_width=300 if field.kind == "text" else 190, elem_classes="pk-field"):
                    self._inputs[field.name] = _component(field)
                    self._add_error(field.name)
                    if field.name == "seed":
                        self._random = gr.Button("Random seed", size="sm", elem_id="pk-random")

    def _add_error(self, place: str) -> None:
        self._errors[place] = gr.HTML(visible=False, elem_id=f"pk-error-{place}")

    def _build_result(self) -> None:
        self._progress = gr.HTML(note_html("The clip appears here."), elem_id="pk-progress")
        self._video = gr.Video(label="Clip", interactive=False, autoplay=False, height=400, elem_id="pk-video")
        self._settings = gr.HTML(elem_id="pk-settings")
        self._gallery = gr.Gallery(
            label="Last clips",
            columns=4,
            fit_columns=False,
            height=200,
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            elem_id="pk-gallery",
        )

    # -- events -----------------------------------------------------------------------------------------------------

    def _connect(self, blocks: gr.Blocks) -> None:
        self._job, self._clips = gr.State(""), gr.State([])
        inputs = [*self._inputs.values(), *self._references, self._clips]
        outputs = [*self._inputs.values(), *self._errors.values(), self._progress, self._video, self._settings]
        outputs += [self._gallery, self._generate, self._cancel, self._job, self._clips]
        outputs += [self._accordion] if self._accordion is not None else []
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self._generate.click(self._run, inputs, outputs, concurrency_limit=None, **hidden)
        self._cancel.click(self._stop, self._job, [self._cancel, self._errors[GENERAL]], queue=False, **hidden)
        if "seed" in self._inputs:
            self._random.click(lambda: random.randint(0, _HIGHEST_SEED), None, self._inputs["seed"], **hidden)
        self._gallery.select(self._show, self._clips, [self._video, self._settings], **hidden)
        blocks.load(self._look, None, self._server, **hidden)
        gr.Timer(SERVER_SECONDS).tick(self._look, None, self._server, **hidden)

    async def _look(self) -> str:
        """Return whether the server answers."""
        try:
            model = await self._client.model()
        except JobError as error:
            return note_html(error.message, "error")
        return note_html(f"{self._client.url} serves {model}", "good")

    async def _run(self, *given: Any) -> AsyncIterator[Updates]:
        """Run a request, and show how it goes on."""
        values = dict(zip(self._inputs, given, strict=False))
        paths, clips = given[len(self._inputs) : -1], given[-1]
        yield {**self._cleared(), self._generate: gr.update(interactive=False), **self._shown("Sending", None)}
        ended: Updates = {self._generate: gr.update(interactive=True), self._cancel: gr.update(interactive=False)}
        form = form_of(values.pop(PROMPT) or "", values, self._fields)
        try:
            async for event in run_job(self._client, form, self._uploads(paths), self._folder):
                if isinstance(event, Progress):
                    going = {self._job: event.job, self._cancel: gr.update(interactive=True)}
                    yield {**self._shown(event.text, event.percent), **going}
                elif isinstance(event, Clip):
                    yield {**ended, **self._finished(event, clips)}
                else:
                    yield {**ended, self._progress: note_html("Cancelled.")}
        except (JobError, OSError) as error:
            yield {**ended, self._progress: note_html("No clip was made."), **self._failed(str(error))}

    async def _stop(self, job: str) -> Updates:
        """Cancel the job; the run then ends by itself."""
        try:
            await self._client.delete(job)
        except JobError as error:
            if error.status != 404:  # it ended in the meantime
                return {self._errors[GENERAL]: gr.update(value=note_html(error.message, "error"), visible=True)}
        return {self._cancel: gr.update(interactive=False)}

    def _show(self, clips: list[dict[str, Any]], event: gr.SelectData) -> tuple[str, str]:
        clip = clips[event.index]
        return clip["path"], settings_html(clip["settings"])

    # -- updates ----------------------------------------------------------------------------------------------------

    def _shown(self, text: str, percent: float | None) -> Updates:
        return {self._progress: progress_html(text, percent)}

    def _cleared(self) -> Updates:
        """Return updates that take the errors away."""
        errors = {slot: gr.update(value="", visible=False) for slot in self._errors.values()}
        return {**errors, **{component: gr.update(elem_classes=[]) for component in self._inputs.values()}}

    def _failed(self, message: str) -> Updates:
        """Return updates that show an error at its place."""
        place = place_of(message, self._fields)
        place = place if place in self._errors else GENERAL
        marked: Updates = {}
        if place in self._inputs:
            marked[self._inputs[place]] = gr.update(elem_classes=["pk-invalid"])
        if any(field.name == place and field.is_option for field in self._fields):
            marked[self._accordion] = gr.update(open=True)
        return {**marked, self._errors[place]: gr.update(value=note_html(message, "error"), visible=True)}

    def _finished(self, clip: Clip, clips: list[dict[str, Any]]) -> Updates:
        kept = [{"path": str(clip.path), "settings": dict(clip.settings)}, *clips][:MAX_CLIPS]
        return {
            self._progress: progress_html(f"Done in {clip.settings['made in']}", 100.0),
            self._video: str(clip.path),
            self._settings: settings_html(clip.settings),
            self._gallery: [(entry["path"], caption_of(entry["settings"])) for entry in kept],
            self._clips: kept,
        }

    def _uploads(self, paths: Sequence[str | None]) -> list[Upload]:
        field = "input_references" if len(self._port.references) > 1 else "input_reference"
        found = [Path(path) for path in paths if path]
        return [(field, (path.name, path.read_bytes())) for path in found]


def _component(field: RequestField) -> Any:
    """Return the component of a field, with its range and its default."""
    label = _LABELS.get(field.name, field.name.replace("_", " ").capitalize())
    default = "" if field.default in (None, "") or field.kind == "text" else f"default {_plain(field.default)}"
    parts = [field.help, field.range_text, default]
    info = " · ".join(part for part in parts if part)
    common: Mapping[str, Any] = {"label": label, "info": info or None, "elem_id": f"pk-{field.name}"}
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=field.default, **common)
    if field.kind == "text":
        return gr.Textbox(value=field.default, lines=1, max_lines=4, **common)
    if field.default is None:  # gradio shows a number without a value as 0
        return gr.Textbox(placeholder="the model's default", lines=1, max_lines=1, **common)
    # no minimum and no maximum: the server refuses a value, with the reason at the field
    return gr.Number(value=field.default, step=field.multiple if field.kind == "int" else 0.1, **common)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
