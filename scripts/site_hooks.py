"""The pages as a site (mkdocs.yml): where they are, their order, and links between them.

Pages are written to be read where the code is hosted, too. So links go from file to file of the
repository, whose README is the first page, and whose docs/README.md lists the others.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are pages by another name; all others are those of docs/.
RENAMED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "docs/README.md": "pages.md",
}
# Code is passed over. The text of a link may contain some.
CODE_OR_LINK = re.compile(
    r"```.*?```|\[(?P<text>(?:`[^`\n]*`|[^\]`])*)\]\((?P<target>[^)\s]+)\)|`[^`\n]*`", re.DOTALL
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation is the table of docs/README.md: its groups, and the links of its rows."""
    config.nav = ["index.md"]
    for line in (ROOT / "docs" / "README.md").read_text(encoding="utf-8").splitlines():
        if group := re.match(r"\| \*\*(.+)\*\* \|", line):
            config.nav.append({group[1]: []})
        elif row := re.match(r"\| \[.+?\]\((.+?)\) \|", line):
            (pages,) = config.nav[-1].values()
            pages.append(site_path(posixpath.normpath(f"docs/{row[1]}")))
    config.nav.append({"All pages": "pages.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.remove(files.src_uris["README.md"])
    for source, name in RENAMED.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    names = {name: source for source, name in RENAMED.items()}
    source = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def on_site(found: re.Match[str]) -> str:
        target = found["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / path).exists():
            raise PluginError(f"{source} has a link to {path}, which does not exist.")
        text = found["text"]
        if site_path(path) in files.src_uris:
            if posixpath.normpath(text.lstrip("./")) in (path, posixpath.basename(path)):
                text = title(path)  # the name of a file says little here
            return f"[{text}]({site_path(path)}{'#' if anchor else ''}{anchor})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        return text

    return CODE_OR_LINK.sub(on_site, markdown)


def site_path(path: str) -> str:
    """Where a file of the repository is on the site, if it is there."""
    return RENAMED.get(path, path.removeprefix("docs/"))


def title(path: str) -> str:
    first = (ROOT / path).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ")
