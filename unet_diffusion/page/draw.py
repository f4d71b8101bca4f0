"""The tab Draw: pictures of a diffusion model, shown as they emerge from noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion.attention_maps import attention_figure
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.output import SampleFolder
from diffusion.pictures import grid
from diffusion.plans import Wanted
from diffusion.process.samplers import SAMPLERS
from diffusion.sampling import STEPS, Images, ImageSampler, with_defaults
from unet.errors import InputError
from unet.files.images import image_info
from unet.training.task import Processes
from unet_diffusion.page.shared import DIFFUSION, Page, interactive, packed, sentences

MOST, MOST_STEPS, FIGURES = 16, 250, 4  # pictures, steps, and pictures whose attention is shown
ANY = "any"
NONE = "No model draws here: `unet app --model RUN/model` gives one of `unet train-ddpm`."


def tab(page: Page, blocks: gr.Blocks) -> None:
    """Builds the tab of the page `blocks`."""
    names = page.names(DIFFUSION)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            model = gr.Dropdown(
                names, value=names[0] if names else None, label="Model", elem_id="draw-model"
            )
            kind = gr.Dropdown([ANY], value=ANY, label="Class", visible=False, elem_id="class")
            prompt = gr.Textbox(label="Prompt", visible=False, elem_id="prompt")
            negative = gr.Textbox(label="Steer away from (with guidance)", visible=False)
            condition = gr.File(
                label="Picture or mask to draw from", visible=False, elem_id="condition"
            )
            count = gr.Slider(1, MOST, 4, step=1, label="Pictures", elem_id="count")
            steps = gr.Slider(1, MOST_STEPS, STEPS, step=1, label="Steps", elem_id="steps")
            sampler = gr.Dropdown(list(SAMPLERS), label="Sampler", elem_id="sampler")
            guidance = gr.Slider(1, 10, 1, step=0.1, label="Guidance", visible=False)
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed")
            attention = gr.Checkbox(label="Show where each word is looked at", visible=False)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop")
        with gr.Column(scale=2):
            view = gr.Image(
                label="Pictures",
                format="png",
                interactive=False,
                height=560,
                elem_id="drawn",
                buttons=["fullscreen", "download"],
            )
            said = gr.Markdown("" if names else NONE, elem_id="draw-said")
            maps = gr.Gallery(
                label="Where each word is looked at",
                visible=False,
                format="png",
                columns=1,
                buttons=["fullscreen", "download"],
                elem_id="maps",
            )
            files = gr.File(
                label="Files", file_count="multiple", interactive=False, elem_id="draw-downloads"
            )

    fields = [kind, prompt, negative, condition, guidance, attention, steps, sampler, draw]
    for field in (model, *fields):
        field.interactive = False  # until it fits the model

    def ready(**more: Any) -> Any:
        return gr.update(interactive=True, **more)

    @sentences
    def fit(name: str | None) -> Any:
        known = page.drawer(name)
        text = "text_encoder" in known.info or known.text is not None
        led = bool(text or known.classes or known.condition)
        usual = with_defaults(SamplingOptions(), known)
        wanted = f"Draw from {known.condition.said()}" if known.condition else ""
        return (
            ready(choices=[ANY, *known.classes], value=ANY, visible=bool(known.classes)),
            ready(visible=text, value=""),
            ready(visible=text, value=""),
            ready(visible=known.condition is not None, label=wanted, value=None),
            ready(visible=led, value=1),
            ready(visible=text, value=False),
            ready(value=usual.steps),
            ready(value=usual.sampler),
            ready(),
        )

    @sentences
    def run(
        name: str,
        class_name: str,
        text: str | None,
        away: str | None,
        file: str | None,
        number: float,
        length: float,
        how: Any,
        scale: float,
        first: float | None,
        looked: bool,
    ) -> Iterator[Any]:
        known = page.drawer(name)
        text, away = (text or "").strip(), (away or "").strip()  # None where it is not shown
        options = SamplingOptions(
            steps=min(int(length), MOST_STEPS),
            sampler=how,
            guidance=scale,
            negative=away if scale != 1 else "",
            seed=int(first or 0),
        )
        wanted, drawer = asked(page, known, options, int(number), class_name, text, file)
        frames: list[Images] = []
        for i, frame in enumerate(drawer.appearing(len(wanted), wanted)):
            frames.append(frame)
            yield grid(drawer.shown(frame)), f"step {i} of {options.steps}", gr.skip(), gr.skip()
        folder = SampleFolder(page.results() / "pictures")
        folder.begin(
            Processes(),
            drawer.channels,
            masks=drawer.mask_channels,
            palette=known.masks.palette if known.masks else None,
            dtype=known.pixels.dtype,
        )
        folder.add(frames[-1], 0)
        numbers = range(len(wanted))
        made = [folder.write_grid(numbers, drawer.shown)]
        made += [file for i in numbers for file in folder.files(i)]
        folder.write_gif([drawer.shown(frame) for frame in frames])
        figures = []
        if looked and text:
            shown = wanted[:FIGURES]
            images, heat = drawer.attending(shown)
            images = drawer.shown(images)
            words = [drawer.text.words(text)] * len(shown)
            figures = [attention_figure(*each) for each in zip(images, words, heat, strict=True)]
        remarks = drawer.text.remarks(text) if text else []
        given = [*made, folder.path / "appearing.gif"]
        archive = packed(given, folder.path, "all.zip")
        yield (
            grid(drawer.shown(frames[-1])),
            " | ".join(remarks) or f"seed {options.seed}: done",
            gr.update(value=figures, visible=bool(figures)),
            [str(path) for path in (archive, *given)],
        )

    hidden: dict[str, Any] = {"api_visibility": "private"}
    if names:
        model.select(**interactive([model, *fields], False))
        fitted = gr.on([blocks.load, model.select], fit, model, fields, **hidden)
        for ended in (fitted.success, fitted.failure):  # `then` is not called after an error
            ended(**interactive([model], True))
    begun = draw.click(
        run,
        [
            *(model, kind, prompt, negative, condition),
            *(count, steps, sampler, guidance, seed, attention),
        ],
        [view, said, maps, files],
        concurrency_id="work",
        concurrency_limit=1,
        show_progress="hidden",
        **hidden,
    )
    stop.click(None, None, None, cancels=[begun], **hidden)


def asked(
    page: Page,
    model: DiffusionUNet,
    options: SamplingOptions,
    count: int,
    class_name: str,
    text: str,
    file: str | None,
) -> tuple[Wanted, ImageSampler]:
    """The request for each picture, and the sampler that draws it.

    Raises:
        InputError: what the model does not know; a condition that is missing, or too large.
    """
    if not 1 <= count <= MOST:
        raise InputError(f"{count} pictures: ask for 1 to {MOST}")
    sampler = ImageSampler(model, options)
    pictures = []
    if model.condition is not None:
        if not file:
            raise InputError(f"this model draws from {model.condition.said()}: give a file")
        info = image_info(Path(file))
        if info.height * info.width > page.most_pixels:
            raise InputError(
                f"{Path(file).name} is {info.height} x {info.width}, which is more than the "
                f"{page.most_pixels:,} pixels that the page takes"
            )
        pictures = [sampler.made_from(Path(file), resize=True)]
    classes = [] if class_name in (ANY, None) or not model.classes else [class_name]
    prompts = [text] if text else []
    return sampler.wanted(range(count), classes, prompts, pictures), sampler
