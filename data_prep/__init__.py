"""Archives into image sets: one module per archive, one shared writer.

``python -m data_prep NAME --help`` tells what each needs.
"""
