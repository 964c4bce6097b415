"""What the tabs of the browser demo share: the look, one-line notices, how a conversation is shown, and safe serving.

Knows gradio and no model. Nothing is fetched from elsewhere, neither by the page nor by what a model writes into it.
"""

import html
import os
import re

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from stagekit.commandline import is_loopback, names_loopback

MODEL_QUEUE = "model"  # concurrency_id of all events that generate, in any tab: one at a time
MAX_WAITING = 64  # events in the queue; more are refused
MAX_UPLOAD = "20mb"  # a file; gradio takes them from whoever reaches the page, asked for or not
SYSTEM_FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "Noto Sans Mono CJK SC", "monospace"]

TITLE = "医疗对话 · Medical chat"
DISCLAIMER = """<p lang="zh">回答由语言模型生成，可能有错，<b>不是医疗建议</b>。急症请立即就医或拨打 120。</p>
<p lang="en">Written by a language model and possibly wrong; <b>no medical advice</b>. In an emergency call your local
emergency number.</p>"""


# -- contents --------------------------------------------------------------------------------------------------------


def show_messages(messages: list[dict]) -> list[dict]:
    """Turn messages into the value of a gr.Chatbot that shows their text to the letter.

    As parts, because gradio strips the indentation of plain strings. What looks like HTML is text: a word joiner keeps
    "Hb<b and c>d" from becoming bold, and a model from writing forms into the page.
    """
    shown = []
    for message in messages:
        text = re.sub(r"<(?=[A-Za-z/!?])(?!/?think>)", "<\u2060", message["content"])
        shown.append({"role": message["role"], "content": [{"type": "text", "text": text}]})
    return shown


def show_notice(text: str, level: str = "info") -> str:
    """HTML of a one-line notice, or of none for an empty text; level is "info" or "error"."""
    role = "alert" if level == "error" else "status"
    return f'<p class="notice {level}" role="{role}">{html.escape(text)}</p>' if text else ""


def show_masthead() -> None:
    """Add the title and the disclaimer, which stays in sight wherever the page is scrolled to."""
    gr.HTML(f"<h1>{TITLE}</h1>", elem_classes="masthead")
    gr.HTML(DISCLAIMER, elem_classes="disclaimer")


def show_caption(facts: dict[str, str]) -> None:
    """Add a line of names and what they are, such as which model answers below it."""
    pairs = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    gr.HTML(f"<dl>{pairs}</dl>", elem_classes="caption")


# -- look ------------------------------------------------------------------------------------------------------------


def theme() -> gr.themes.Base:
    """Calm greens on near-white or near-black, in the fonts of the reader's own system."""
    sea = gr.themes.Color(
        *(
            "#effaf8",
            "#d6f2ed",
            "#aee4dc",
            "#7ccfc5",
            "#4bb3a9",
            "#2b968d",
            "#1f7872",
            "#1c605d",
            "#1a4d4b",
            "#18403f",
        ),
        c950="#082524",
    )
    stone = gr.themes.Color(
        *(
            "#f7f9f9",
            "#eef2f2",
            "#dde4e4",
            "#c3cecf",
            "#93a3a5",
            "#66787b",
            "#4b5c5f",
            "#37474a",
            "#223033",
            "#172224",
        ),
        c950="#0f1819",
    )
    look = gr.themes.Base(
        primary_hue=sea,
        secondary_hue=sea,
        neutral_hue=stone,
        radius_size="lg",
        font=SYSTEM_FONTS,
        font_mono=MONO_FONTS,
    )
    return look.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_800",
        body_text_color_dark="*neutral_100",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_label_background_fill="white",
        block_label_background_fill_dark="*neutral_900",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_cancel_background_fill="white",
        button_cancel_background_fill_dark="*neutral_800",
        button_cancel_border_color="#d9a19d",
        button_cancel_border_color_dark="#7c3c38",
        button_cancel_text_color="#a3302a",
        button_cancel_text_color_dark="#f2a19b",
        button_border_width="1px",
        border_color_accent="*primary_200",
        border_color_accent_dark="*primary_800",
        color_accent_soft_dark="*primary_900",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_width="1px",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )


CSS = """
.gradio-container { overflow: clip !important; }  /* hidden, gradio's choice, would undo position: sticky */
.gradio-container > .main { max-width: 1240px !important; margin: 0 auto; padding: 14px 24px !important; }
.gradio-container .column, .gradio-container .row { gap: 10px; }
.gradio-container .tabitem { padding: 0; border: 0; }
.gradio-container .html-container { padding: 0; }

.prose.masthead h1 { font-size: 1.3rem; font-weight: 650; margin: 0; white-space: nowrap; }
.prose.masthead h1::before {
  content: ""; display: inline-block; width: .85em; height: .85em; margin-right: .5em; vertical-align: -.05em;
  background: var(--primary-600);
  clip-path: polygon(33% 0, 67% 0, 67% 33%, 100% 33%, 100% 67%, 67% 67%, 67% 100%, 33% 100%, 33% 67%, 0 67%, 0 33%,
    33% 33%);
}
.dark .prose.masthead h1::before { background: var(--primary-400); }
.prose.caption dl { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0; font-size: .8rem; }
.prose.caption dl div { display: flex; gap: 6px; }
.prose.caption dt { color: var(--body-text-color-subdued); font-weight: 400; }
.prose.caption dd { margin: 0; }

.block.disclaimer {
  position: sticky; top: 0; z-index: 20; padding: 7px 16px !important; border-radius: var(--radius-md) !important;
  background: #fdf5e2 !important; box-shadow: inset 4px 0 #d6a13b;
}
.prose.disclaimer p { margin: 0; font-size: .82rem; line-height: 1.5; color: #5b4512; }
.prose.disclaimer b { color: inherit; }
.dark .block.disclaimer { background: #2a2414 !important; box-shadow: inset 4px 0 #a97e2c; }
.dark .prose.disclaimer p { color: #ecd9a8; }

.block.window { height: max(300px, calc(100dvh - 340px)) !important; }
.window button[aria-label="Clear"] { display: none; }  /* it would clear what is shown, not what the model is told */
.window .placeholder-content { max-width: 720px; margin: 0 auto; }
.window .examples { grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)) !important; }
.window .example { padding: 10px 14px !important; border-radius: var(--radius-lg) !important; }
.window .message-content { font-size: 1rem; line-height: 1.6; }
.window .message-content .prose { opacity: 1; }
.window .message-row { margin: 12px 20px 2px !important; }
.window .message-buttons { margin: 0 !important; }
.window .message-buttons .icon-button-wrapper { border: 0; background: none; box-shadow: none; }
.window .message-buttons button { opacity: .4; }
.window .message-buttons button:hover, .window .message-buttons button:focus-visible { opacity: 1; }
.window .meta-text { right: auto; left: 20px; bottom: 10px; font: inherit; font-size: .85rem; }
.window .meta-text::before { content: "请稍候 Please wait · "; }
.prose.passages details { margin: 2px 0; font-size: .85rem; line-height: 1.5; }
.prose.passages summary { cursor: pointer; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.prose.passages .cited summary { color: var(--body-text-color); font-weight: 600; }
.prose.passages p { margin: 2px 0 8px 16px; white-space: pre-wrap; overflow-wrap: anywhere; }
.prose.notices { min-height: 1.4em; font-size: .85rem; }
.prose.notices .notice { margin: 0; font-size: inherit; line-height: 1.4; color: var(--body-text-color-subdued); }
.prose.notices .notice.error { color: #a3302a; }
.dark .prose.notices .notice.error { color: #f2a19b; }

.composer { align-items: flex-end; flex-wrap: nowrap !important; }
.composer textarea { font-size: 1rem; }
.composer button { flex: none; height: 42px; padding: 0 18px; font-size: 1rem; white-space: nowrap; }
.tools button { border: 1px solid var(--button-secondary-border-color); }
.settings { padding: 10px 14px !important; }
.settings .form { border: 0; box-shadow: none; background: none; }
.settings .form .block { padding: 8px 0; border: 0; background: none; }
.settings span[data-testid="block-info"] { font-size: .84rem; }
.settings input[type="number"] { width: 62px; }

@media (max-width: 640px) {
  .gradio-container > .main { padding: 10px 12px !important; }
  .block.window { height: max(300px, calc(100dvh - 414px)) !important; }
  .compared .block.window { height: 300px !important; }
  .prose.disclaimer p { font-size: .76rem; line-height: 1.4; }
  .composer button { padding: 0 12px; min-width: 0 !important; }
}
"""


# -- serving ---------------------------------------------------------------------------------------------------------


def serve(demo: gr.Blocks, host: str, port: int, auth: tuple[str, str] | None = None, share: bool = False) -> str:
    """Start serving in a thread of its own and return the address.

    Args:
        demo: the page.
        host, port: where to listen; the port is free.
        auth: user and password to ask for.
        share: tunnel through gradio.live as well.

    Where only this machine is meant to reach the page, and without a password, it answers to no other name.

    Raises:
        ValueError, OSError: it could not be started.
    """
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own server whether it is there, which no proxy knows
        known = os.environ.get(name, "").split(",")
        os.environ[name] = ",".join(filter(None, dict.fromkeys([*known, "localhost", host])))
    middleware = [Middleware(_Policy, share=share)]
    if is_loopback(host) and not (auth or share):
        middleware.insert(0, Middleware(_OwnNames))
    _, local, public = demo.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        auth=auth,
        auth_message=f"<h2>{TITLE}</h2>{DISCLAIMER}",
        share=share,
        theme=theme(),
        css=CSS,
        app_kwargs={"middleware": middleware},
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,  # it would keep every question in the browser
        enable_monitoring=False,
        max_file_size=MAX_UPLOAD,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
    )
    if share and not public:
        raise ValueError(f"--share: gradio.live gave no address; without it the demo is served on {host} alone")
    return public or local


class _OwnNames:
    """ASGI middleware: refuse requests that call this machine by another name than its own."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        app = self.app
        if scope["type"] != "lifespan" and not names_loopback(Headers(scope=scope).get("host", "")):
            app = PlainTextResponse("without a password this page answers only to 127.0.0.1 and localhost", 403)
        await app(scope, receive, send)


class _Policy:
    """ASGI middleware: forbid the browser to load anything from elsewhere, whatever a model writes into the page."""

    def __init__(self, app, share: bool):
        # A page seen through gradio.live loads gradio's own scripts from there.
        ours = "'self' https://gradio.s3-us-west-2.amazonaws.com" if share else "'self'"
        rules = (
            f"default-src {ours}",
            f"script-src {ours} 'unsafe-inline' 'unsafe-eval'",
            f"style-src {ours} 'unsafe-inline'",
            f"font-src {ours} data:",
            "img-src 'self' data: blob:",
            "media-src 'self' data: blob:",
            "worker-src 'self' blob:",
            "form-action 'self'",
        )
        self.app, self.policy = app, "; ".join(rules).encode()

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", self.policy)]
                message = {**message, "headers": [*headers, (b"referrer-policy", b"same-origin")]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
