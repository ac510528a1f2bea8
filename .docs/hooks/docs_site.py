"""What mkdocs calls: pages made of the sources, their places in the navigation, and links to papers.

Nothing of FlowAlign is imported, so that the site can be built where no torch is.
"""

from __future__ import annotations

from typing import Any

import docs_configs
import docs_methods
import docs_reference
import docs_rewards
from docs_sources import configs
from docs_text import linked
from mkdocs.structure.files import File


def on_config(config: Any) -> Any:
    """Put the generated pages where the navigation says `generated: NAME`."""
    config.nav = [_filled(item) for item in config.nav]
    return config


def _filled(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    ((title, inside),) = item.items()
    if not isinstance(inside, list):
        return item
    made: list[Any] = []
    for one in inside:
        made += _listed(one["generated"]) if isinstance(one, dict) and "generated" in one else [_filled(one)]
    return {title: made}


def _listed(name: str) -> list[Any]:
    lists = {
        "methods": [{one: docs_methods.path(one)} for one in docs_methods.methods()],
        "rewards": [{title: f"rewards/{key}.md"} for key, (title, _) in docs_rewards.families().items()],
        "configs": [{folder: f"configs/{folder}.md"} for folder in dict.fromkeys(one.folder for one in configs())],
        "reference": [{title: f"reference/{key}.md"} for key, (title, _) in docs_reference.subjects().items()],
    }
    return lists[name]


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those that lie in pages/."""
    for module in (docs_methods, docs_rewards, docs_configs, docs_reference):
        for path, text in module.pages().items():
            files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Link the papers that a page names."""
    return linked(html)
