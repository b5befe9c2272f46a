"""``precision="fastest"``: forms of a bundle's graph for ONNX Runtime on the CPU, measured.

`docs/fastest.md` says what is measured and what is kept. The bundle's graph stays what it is: forms
are made when a bundle is opened, from the serialised model and with numpy alone.
"""
