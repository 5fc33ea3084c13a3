"""What looks at people's material before models do: faces, found, followed, aligned, put back and drawn as
masks, and speech in a mix.

crops.py     squares and turned regions of a frame, shrunk without aliasing
detect.py    the detector: boxes of one frame, second look, tiles
mesh.py      468 points and presence of each face of one frame; points that alignment and masks take from them
track.py     faces of a video, frame by frame in constant memory
smooth.py    gaps between frames, and points without jitter
align.py     three points to a matrix, frames to aligned faces and back
paste.py     generated faces into their frames
masks.py     hull of a face, ring of its lips
face_file.py `face.safetensors`: what maps a clip's frames to aligned faces
given.py     faces that another detector found
separation.py, mdx_net.py, spectral_gate.py  speech out of a mix

Coordinates are x, y in pixels of the frame with pixel i covering [i, i + 1); only `align.py` and `paste.py`
count from pixel centres, as the published alignment does, and say so.
"""
