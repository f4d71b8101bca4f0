"""The page as a whole, and how it is served: on this machine alone unless told otherwise."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

import gradio as gr

from unet_diffusion.page import draw, label, learn, runs
from unet_diffusion.page.shared import SEGMENTATION, Page

LETTERS = ["system-ui", "sans-serif"]  # of the reader's machine: nothing is fetched from elsewhere
KEPT = 86_400  # seconds that uploads and results are kept


def build(page: Page) -> gr.Blocks:
    """The page with its four tabs."""
    names = page.names(SEGMENTATION)
    with gr.Blocks(
        title="unet", analytics_enabled=False, delete_cache=(3600, KEPT), fill_width=True
    ) as blocks:
        current = gr.State(None)
        with gr.Tab("Label", elem_id="tab-label"):
            model = gr.Dropdown(
                names, value=names[0] if names else None, label="Model", elem_id="label-model"
            )
            label.tab(page, current, model)
        with gr.Tab("Correct and learn", elem_id="tab-learn"):
            learn.tab(page, current, model)
        with gr.Tab("Draw", elem_id="tab-draw"):
            draw.tab(page, blocks)
        with gr.Tab("Runs", elem_id="tab-runs"):
            runs.tab(page)

        def closed(request: gr.Request) -> None:
            page.ended(request.session_hash)

        blocks.unload(closed)

        def learnt() -> Any:
            return gr.update(choices=page.names(SEGMENTATION))

        blocks.load(learnt, None, model, api_visibility="private", show_progress="hidden")
    return blocks


def serve(
    page: Page,
    *,
    host: str,
    port: int | None,
    password: str | None,
    most_megabytes: int,
) -> tuple[gr.Blocks, str]:
    """Serves the page until `close` is called on it.

    Args:
        port: None: a free one from 7860 on.
        password: that a browser is asked for, with any name; None: it is not.
        most_megabytes: of an upload.

    Returns:
        The page, and its address.
    """
    auth: Callable[[str, str], bool] | None = None
    if password is not None:
        secret = password.encode()

        def allowed(_: str, given: str) -> bool:
            return hmac.compare_digest(given.encode(), secret)

        auth = allowed
    blocks = build(page).queue(max_size=64, default_concurrency_limit=4, api_open=False)
    theme: Any = gr.themes.Default(font=LETTERS, font_mono=["monospace"])
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        max_file_size=most_megabytes * 2**20,
        blocked_paths=[str(page.folder / "lessons"), str(page.folder / "models")],
        theme=theme,
        footer_links=[],
        run_history=False,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return blocks, address
