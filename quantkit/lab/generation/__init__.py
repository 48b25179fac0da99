"""What models write: texts by llama-completion, faults in them, and rubrics that try out programs. May import what
lies below lab; offers generate.generate and rubric."""
