"""What models write: texts by llama-completion, what is broken in them, and programs tried by rubrics. May import what
lies below lab; offers generate.generate and rubric."""
