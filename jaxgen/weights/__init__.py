"""Published weights, in and out.

files       tensors of safetensors, torch and hub folders, opened lazily
mapping     names and layouts: one table for both directions
source      what is known of a source beside its names
sources     all sources; which of them a file is of
diffusers guided compvis meta edm numbered gans    the tables
importing   a file as a run at step 0
exporting   a run as a file, with a model card
published   what others published and the zoo can take
"""
