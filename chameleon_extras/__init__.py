"""What surrounds the model and never changes it.

    command.py      what `python generate.py` does: options, checks, output
    chat.py         `generate.py --chat`: a conversation on a terminal
    demo.py         `generate.py --demo`: the same on a page
    prompts.py      `generate.py --prompts`: many prompts, answered in batches
    sheets.py       pictures and pages to look at
    explain.py      `generate.py --explain`: one prompt's way through the model
    stats.py        `generate.py --stats`: speed, and what the memory would allow
    decoding.py     faster steps: static caches, compiled graphs, other attention kernels
    quantize.py     weights in 8 or 4 bits
    parallel.py     one model on several devices
    checkpoint.py   weights on disk, in the Hugging Face layout
    pretrained.py   `from_pretrained` with the options of transformers
    release.py      weights in Meta's layout, and in that of Anole's fork
    convert.py      the command that converts one layout to another
    files.py        helpers of the files above
"""
