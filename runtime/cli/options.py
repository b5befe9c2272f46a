"""Options that several commands of the runtime have."""

from __future__ import annotations

import argparse


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """Add what says how the vision encoder is run: ``--backend``, ``--engine``, ``--precision``."""
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="what runs the vision encoder (default: auto, the best that is installed)",
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="which of the bundle's TensorRT engines is run (default: the only one that fits)",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="int8 or fp8: run the graph that 'vzip calibrate' made, or an engine built from it; "
        "fastest, with --backend onnxruntime: what is measured to be (default: the bundle's own)",
    )
