import sys

import pytest
from PIL import Image, ImageChops

from diffusers_dti.figures import GAP, SheetRow, figure_class, paint_sheet

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
LINE = 19  # pixels of a line of text at the smallest size
LABELS = 200  # pixels of the labels' column


def plain(color, size=(192, 192)):
    return Image.new("RGB", size, color)


def ink(sheet, box):
    """Whether a part of a sheet, (left, top, right, bottom), has anything on it."""
    part = sheet.crop(box)
    return ImageChops.difference(part, Image.new("RGB", part.size, "white")).getbbox() is not None


def test_the_guard_returns_the_class():
    from matplotlib.figure import Figure

    assert figure_class() is Figure


def test_the_guard_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "diffusers-dti\[plot\]"'):
        figure_class()


def test_images_without_text():
    sheet = paint_sheet([SheetRow([plain(RED), plain(GREEN)]), SheetRow([plain(BLUE)])])
    assert sheet.mode == "RGB" and sheet.size == (2 * (192 + GAP), GAP + 2 * (192 + GAP))
    for corner, color in (((0, GAP), RED), ((192 + GAP, GAP), GREEN), ((0, 192 + 2 * GAP), BLUE)):
        left, top = corner
        assert sheet.crop((left, top, left + 192, top + 192)).getcolors() == [(192 * 192, color)]
    assert not ink(sheet, (192 + GAP, 192 + 2 * GAP, *sheet.size))  # a short row
    assert not ink(sheet, (192, 0, 192 + GAP, sheet.height))


def test_an_empty_cell():
    sheet = paint_sheet([SheetRow([None, plain(RED)]), SheetRow([plain(GREEN), None])])
    assert not ink(sheet, (0, 0, 192 + GAP, 192 + GAP)) and sheet.getpixel((192 + GAP, GAP)) == RED
    assert not ink(sheet, (192, 192 + 2 * GAP, *sheet.size)) and sheet.getpixel((0, 192 + 2 * GAP)) == GREEN


def test_titles_are_wrapped_above_their_columns():
    title = "a very long title that needs more than one line"
    sheet = paint_sheet([SheetRow([plain(RED), plain(GREEN), plain(BLUE)])], [title, "", "b"])
    top = 2 * LINE + GAP
    assert sheet.height == top + 192 + GAP and sheet.getpixel((0, top)) == RED
    assert (
        ink(sheet, (0, 0, 192, LINE))
        and ink(sheet, (0, LINE, 192, top))
        and ink(sheet, (2 * (192 + GAP), 0, sheet.width, LINE))
    )
    assert not ink(sheet, (192 + GAP, 0, 2 * (192 + GAP), top))


def test_labels_and_notes_are_next_to_their_rows():
    sheet = paint_sheet([SheetRow([plain(RED)], "a label", "a note\nof two lines"), SheetRow([plain(GREEN)])])
    right, below = LABELS + 192 + GAP, 192 + 2 * GAP
    assert sheet.width > right + 80 and sheet.getpixel((LABELS, GAP)) == RED and sheet.getpixel((LABELS, below)) == GREEN
    assert ink(sheet, (0, 0, LABELS, 192)) and not ink(sheet, (0, 192, LABELS, sheet.height))
    assert ink(sheet, (right, GAP, sheet.width, GAP + LINE)) and ink(sheet, (right, 2 * GAP + LINE, sheet.width, 192))
    assert not ink(sheet, (right, below, *sheet.size))


def test_labels_end_with_their_row():
    rows = [SheetRow([plain(RED, (192, 96))], "many words " * 40), SheetRow([plain(GREEN, (192, 96))])]
    sheet = paint_sheet(rows)
    assert ink(sheet, (0, 0, LABELS, 96 + 2 * GAP)) and not ink(sheet, (0, 96 + 2 * GAP, LABELS, sheet.height))


def test_text_grows_with_the_tiles():
    small, large = (paint_sheet([SheetRow([plain(RED)], "a label")], tile_width=width) for width in (192, 768))
    assert large.width - 768 > 2 * (small.width - 192)


def test_the_first_image_decides_the_shape():
    sheet = paint_sheet([SheetRow([None, plain(RED, (64, 32)), plain(GREEN, (32, 64))])], tile_width=128)
    assert sheet.size == (3 * (128 + GAP), GAP + 64 + GAP)
    assert sheet.crop((2 * (128 + GAP), GAP, 2 * (128 + GAP) + 128, GAP + 64)).getcolors() == [(128 * 64, GREEN)]


def test_enlarged_pixels_stay_sharp():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    sheet = paint_sheet([SheetRow([image])], tile_width=100)
    assert sheet.crop((0, GAP, 100, GAP + 50)).getcolors() == [(50 * 50, RED), (50 * 50, BLUE)]


def test_files_and_other_modes(tmp_path):
    images = [Image.effect_noise((40, 30), 90), Image.new("RGBA", (20, 20), (0, 0, 255, 255)), Image.new("P", (8, 8))]
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    sheets = [paint_sheet([SheetRow(cells, "label")], ["a", "b", "c"]) for cells in (images, paths)]
    assert sheets[0].tobytes() == sheets[1].tobytes() and ink(sheets[0], (LABELS, 2 * LINE, *sheets[0].size))


@pytest.mark.parametrize("rows", [[], [SheetRow([])], [SheetRow([None], "label")]])
def test_a_sheet_needs_an_image(rows):
    with pytest.raises(ValueError, match="at least one image"):
        paint_sheet(rows, ["title"])
