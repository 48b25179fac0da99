"""Studies: variants of a recipe along axes, measured side by side or built and measured; results stay. May import
evaluation and calibration; offers study.load_study, ablate.ablate, files.StudyFiles, findings, estimate.study_work and
results.Results."""
