"""Text to a shard folder: by many processes, in the same bytes, however often they are killed.

formats/                    what input files look like: endings, how they are cut, their documents
inputs.py -> plan.py        which files, in which parts
pieces.py (compression.py)  files to whole records, as they are stored
documents.py -> encode.py   records to tokens and ready tar records, in many processes
deduplicate.py              texts that occurred before
parts.py                    records to the shards of a part, which a restart goes on behind
work_folder.py, publish.py  who works where, and how the parts become the folder
write_shards.py             the story of one process
"""
