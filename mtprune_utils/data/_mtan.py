"""The folders of MTAN (Liu et al., CVPR 2019) and LibMTL: {train,val}/{image,label,depth,normal}/{i}.npy."""

from pathlib import Path

from mtprune_utils.data import _reading


def is_mtan(root: Path) -> bool:
    return (root / "train" / "image").is_dir()


def mtan_files(root: Path) -> list[Path]:
    """Every file of both splits."""
    found = [file for split in ("train", "val") for file in sorted(root.glob(f"{split}/*/*.npy"))]
    return [file for file in found if not file.name.startswith(".")]  # as other systems leave beside


def mtan_split(root: Path, split: str, classes: int, label_folder: str, normals: bool) -> dict:
    """One split's tensors. Raises FileNotFoundError or ValueError, naming the file.

    With normals, depth is in metres; without (Cityscapes), it is inverse depth.
    """
    unit = "metres" if normals else "inverse depth"
    folder = root / split
    if not (folder / "image").is_dir():
        raise FileNotFoundError(f"{folder / 'image'} is missing: expected the MTAN layout, {{train,val}}/{{image,...}}/0.npy")
    kinds = ("image", label_folder, "depth", *(["normal"] if normals else []))
    files = [file for file in mtan_files(root) if file.parts[-3] == split and file.parts[-2] in kinds]
    names = sorted({file.name for file in files}, key=lambda name: (len(name), name))
    if not names:
        raise FileNotFoundError(f"{folder / 'image'} holds no .npy files: the MTAN layout has 0.npy ...")

    def read(i: int) -> _reading.Sample:
        files = {kind: folder / kind / names[i] for kind in ("image", label_folder, "depth", "normal")}
        image = _reading.checked_image(_reading.read_array(files["image"], "an RGB image"), files["image"])
        size = image.shape[:2]
        labels, depth = files[label_folder], files["depth"]
        sample = {
            "image": image,
            "segmentation": _reading.checked_labels(_reading.read_array(labels, "class labels"), classes, size, labels),
            "depth": _reading.checked_depth(_reading.read_array(depth, "depth"), size, depth, unit),
        }
        if normals:
            normal = files["normal"]
            sample["normals"] = _reading.checked_normals(_reading.read_array(normal, "surface normals"), size, normal)
        return sample

    return _reading.stacked(_reading.in_order(read, len(names)), [str(folder / "image" / name) for name in names], str(folder))
