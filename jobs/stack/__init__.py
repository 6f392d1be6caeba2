"""A cluster on one machine without containers: Ray with several nodes, MLflow, S3; for replay, tests and trying out."""
