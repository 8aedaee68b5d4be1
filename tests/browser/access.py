"""What axe-core says of a page, for people who use a keyboard, a screen reader or their own colours."""

from __future__ import annotations

from playwright.sync_api import Page


def check_access(page: Page, axe: str, where: str, but: frozenset[str] = frozenset()) -> None:
    """axe-core finds nothing critical or serious, no missing name and no skipped heading.

    Args:
        page: as it is shown now.
        axe: axe-core's script.
        where: for the message.
        but: rules that count as passed.
    """
    page.evaluate(axe)
    found = page.evaluate("axe.run(document)")["violations"]
    grave = [
        (rule["id"], [node["html"][:200] for node in rule["nodes"]])
        for rule in found
        if (rule["impact"] in ("critical", "serious") and rule["id"] not in but) or rule["id"] == "heading-order"
    ]
    assert not grave, f"{where}: {grave}"
