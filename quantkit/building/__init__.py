"""A plan made into files: engines quantize rows, an unfinished build keeps what is durable, a cache keeps tensors
from build to build. May import planning and what is below; offers run.prepare and run.run."""
