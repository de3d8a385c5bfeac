"""The page's colours: text that everyone can read, whatever it is shown on (WCAG 2, level AA)."""

import re
from pathlib import Path

from obsdiff.measure import report


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2)."""
    digits = colour.removeprefix("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_stands_out_from_what_is_behind_it_in_light_and_dark_and_on_paper() -> None:
    style = Path(report.__file__).with_name("report.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--(\w+): (#\w+);", body)) for body in re.findall(r":root \{([^}]*)\}", style)]
    assert len(themes) == 3
    for theme in themes:
        for text in ("ink", "dim", "mark", "good", "bad"):
            for behind in ("page", "card"):
                low, high = sorted((luminance(theme[text]), luminance(theme[behind])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, behind, theme)
