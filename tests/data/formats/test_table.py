"""CSV files with and without a header."""

import pytest

BOX = (0, (1.0, 2.0, 29.5, 38.0), 0)


@pytest.fixture
def images(write):
    write("c/images/a.jpg", (100, 80))
    write("c/images/ä b.jpg", (80, 100, 8))


@pytest.mark.parametrize(
    "text",
    [
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,100,80,car,1,2,30.5,40\n",
        "\ufeffLabel;X1;Y1;X2;Y2;Image_Path\r\n\r\ncar;1;2;30.5;40;a.jpg\r\n",
        "path\tx\ty\tw\th\tclass\textra\na.jpg\t1\t2\t29.5\t38\tcar\t?\n",
        "a.jpg,1,2,30.5,40,car\n",
    ],
    ids=["tensorflow", "spreadsheet", "tabs and sizes", "keras-retinanet"],
)
def test_columns(images, write, load, text):
    write("c/train.csv", text)
    expected = ["car"], {"c/images/a.jpg": (100, 80, [BOX])}
    assert load("csv:c/train.csv:c/images") == expected


def test_images_without_objects_and_quoted_names(images, write, load):
    write("c/train.csv", 'images/a.jpg,,,,,\n"images\\ä b.jpg",1,2,30.5,40,"a ""b"", c"\n')
    assert load("csv:c/train.csv") == (
        ['a "b", c'],
        {"c/images/a.jpg": (100, 80, []), "c/images/ä b.jpg": (100, 80, [BOX])},
    )


def test_files_of_a_folder_number_the_classes_alike(images, write, load):
    """Tables of something else have no classes. Numbers are sorted by value."""
    head = "image,x1,y1,x2,y2,class\n"
    write("c/train.csv", f"{head}images/a.jpg,1,2,3,4,10\n")
    write("c/val.csv", f"{head}images/a.jpg,1,2,3,4,9\nimages/a.jpg,1,2,3,4,2\n")
    write("c/results.csv", "epoch,loss\n1,2\n")
    assert load("csv:c/train.csv")[0] == load("csv:c/val.csv")[0] == ["2", "9", "10"]
    write("c/classes.csv", "9,0\n10,2\n2,1\n")
    assert load("csv:c/val.csv")[0] == ["9", "2", "10"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg,1,2,3,4,car\na.jpg,5,2,3,4,car", "line 2: the box 5, 2, 3, 4 has a negative"),
        ("a.jpg,1,2,3,4,car\n\na.jpg,1,2,?,4,car", "line 3: x2 is '?', which is no number"),
        ("a.jpg,1,2,3,4,car\na.jpg,1,2,3,4,", "line 2: the box has no class"),
        ("a.jpg,1,2,3,4,car\na.jpg,1,2", "line 2: has 3 values, but there are 6 columns"),
        ("a.jpg,1,2,3,4,car\n,1,2,3,4,car", "line 2: names no image"),
        ("a.jpg,1,2,3,4,car\nz.jpg,1,2,3,4,car", "line 2: there is no image"),
        ("image,x1,y1,x2,y2\na.jpg,1,2,3,4", "no column for class, which is called class or label"),
        ("image,class,x1,y1,x2\na.jpg,car,1,2,3", "no column for y2, which is called ymax or y2"),
        ("image,path,class\n", "the columns 'image' and 'path' both name the image: keep one"),
        ("image,x1,y1,x2,y2,class\n", "has no line below its header"),
        ("a.jpg,,,,,\n", "has no boxes: name the classes in a labels.txt"),
        ("", "is empty"),
    ],
)
def test_fault_names_file_and_line(images, write, fault, text, expected):
    write("c/train.csv", text)
    line = fault("csv:c/train.csv:c/images")
    assert "train.csv" in line and expected in line
