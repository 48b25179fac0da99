"""Studies: variants of a recipe along axes, measured side by side, or built and measured; results are kept. May import
evaluation and calibration; offers study.load_study, ablate.ablate, files.StudyFiles, findings, estimate.study_work and
results.Results."""
