"""Start-up part: runs from a .pth in every interpreter of the environment, so it must cost nothing.

Only what must happen before SGLang is imported belongs here.

PyPI's torchvision wheel is a CUDA build. With a CPU torch its extension does not load, and
torchvision/_meta_registrations.py dies with "operator torchvision::nms does not exist". Declaring the
operators' schemas first is enough, since SGLang never calls them for a text model.
"""

import sys


class _BeforeTorchvision:
    """A finder that finds nothing: it declares the schemas when torchvision is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare_operators()
        return None


def _declare_operators():
    try:
        from importlib.metadata import version

        import torch

        # A torch with CUDA, or a torchvision built for the CPU, loads its own operators; declaring
        # them twice is an error.
        if torch.version.cuda is not None or "+cpu" in version("torchvision"):
            return
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys._hicache_ext_torchvision_library = library  # the schemas live as long as this object
    except Exception as error:  # the import that follows tells more than we could
        print(f"hicache-ext-sglang-cpu: torchvision's operators were not declared: {error}", file=sys.stderr)


sys.meta_path.insert(0, _BeforeTorchvision())
