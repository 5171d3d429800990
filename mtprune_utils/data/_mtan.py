"""The folders of MTAN (Liu et al., CVPR 2019) and LibMTL: {train,val}/{image,label,depth,normal}/{i}.npy."""

from pathlib import Path

from mtprune_utils.data import _reading


def is_mtan(root: Path) -> bool:
    return (root / "train" / "image").is_dir()


def mtan_files(root: Path) -> list[Path]:
    """Every file of both splits."""
    return sorted(root.glob("train/*/*.npy")) + sorted(root.glob("val/*/*.npy"))


def mtan_split(root: Path, split: str, classes: int, label_folder: str, normals: bool) -> dict:
    """One split's tensors. Raises FileNotFoundError or ValueError, naming the file."""
    folder = root / split
    if not (folder / "image").is_dir():
        raise FileNotFoundError(f"{folder / 'image'} is missing: expected the MTAN layout, {{train,val}}/{{image,...}}/0.npy")
    names = sorted((file.name for file in (folder / "image").glob("*.npy")), key=lambda name: (len(name), name))

    def read(i: int) -> _reading.Sample:
        files = {kind: folder / kind / names[i] for kind in ("image", label_folder, "depth", "normal")}
        image = _reading.checked_image(_reading.read_array(files["image"], "an RGB image"), files["image"])
        size = image.shape[:2]
        labels, depth = files[label_folder], files["depth"]
        sample = {
            "image": image,
            "segmentation": _reading.checked_labels(_reading.read_array(labels, "class labels"), classes, size, labels),
            "depth": _reading.checked_depth(_reading.read_array(depth, "depth"), size, depth),
        }
        if normals:
            normal = files["normal"]
            sample["normals"] = _reading.checked_normals(_reading.read_array(normal, "surface normals"), size, normal)
        return sample

    return _reading.stacked(_reading.in_order(read, len(names)), [str(folder / "image" / name) for name in names], str(folder))
