"""Page of the board's server that opens TensorBoard at the layout, with whole axes and the main signals.

TensorBoard scales charts without their outermost values, which cuts off the first and last points of a short run. The
setting is kept in the browser, hence a page of the same address sets it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable

from tensorboard.backend import http_util
from tensorboard.backend.experimental_plugin import ExperimentalPlugin
from tensorboard.plugins.base_plugin import TBPlugin
from werkzeug import Request, Response

PINNED = ("alarm", "rankme", "view_retrieval_whitened", "linear_probe", "odcorr")
"""Signals of the Time Series tab: it shows them alone, and all others below once its filter is cleared."""
PATH = "data/plugin/repmetrics/board"
FRAGMENT = "#custom_scalars&_smoothingWeight=0"
"""The custom-scalars page. Smoothing is off: smoothed lines do not match their error bands."""
SCRIPT = """
const settings = "_tb_global_settings", pinned = %(pinned)s;
localStorage.setItem("_ignoreYOutliers", "false");
localStorage.setItem(settings, JSON.stringify({
  ...JSON.parse(localStorage.getItem(settings) || "{}"), ignoreOutliers: false, scalarSmoothing: 0,
}));
let tags = [];
for (let k = 0; k < 50 && !tags.length; k++) {  // until the files are read
  if (k) await new Promise(resolve => setTimeout(resolve, 200));
  const runs = await fetch("../scalars/tags").then(answer => answer.json());
  tags = [...new Set(Object.values(runs).flatMap(Object.keys))];
}
const found = pinned.flatMap(name => tags.filter(tag => tag.endsWith("/" + name)));
const depth = tag => tag.split("/").length, least = Math.min(...found.map(depth));  // no further layers
const main = found.filter(tag => depth(tag) == least);
const prefixes = [...new Set(main.map(tag => tag.slice(0, tag.lastIndexOf("/"))))];
const query = new URLSearchParams({smoothing: 0});
if (main.length) {  // TensorBoard hides pinned charts while tags are filtered
  query.set("tagFilter", `^(${prefixes.join("|")})/(${pinned.join("|")})$`);
  query.set("pinnedCards", JSON.stringify(main.slice(0, 10).map(tag => ({plugin: "scalars", tag}))));
}
location.replace("../../../?" + query + %(fragment)s);
"""


class OpeningPage(ExperimentalPlugin, TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """A route of TensorBoard's server. Experimental plugins have no tab of their own."""

    plugin_name = "repmetrics"

    def get_plugin_apps(self) -> dict[str, Callable[..., Iterable[bytes]]]:
        """The page, at `PATH`."""
        return {"/board": _page}

    def is_active(self) -> bool:
        """False: there is nothing to show in a tab."""
        return False


@Request.application
def _page(request: Request) -> Response:
    script = SCRIPT % {"pinned": json.dumps(PINNED), "fragment": json.dumps(FRAGMENT)}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = f'<!doctype html><title>board</title><p>Opening …</p><script type="module">{script}</script>'
    return http_util.Respond(request, html, "text/html", csp_scripts_sha256s=[digest])
