"""A plugin of pytest that makes `import torchvision` work beside any build of torch, for timm.

torchvision's Python describes two operators of its compiled module, which cannot be loaded beside a
build of torch that the wheel was not made for, such as one for CPUs alone. timm calls neither.
"""

import importlib.util

import torch

(folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
try:
    torch.ops.load_library(f"{folder}/_C.so")
except OSError:
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
