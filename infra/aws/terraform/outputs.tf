output "bucket" {
  description = "For checkpoint.url and data.prepared_url of a run, and for mlflow.yaml."
  value       = aws_s3_bucket.this.id
}

output "pod_roles" {
  description = "For the annotations of infra/kubernetes/serviceaccounts.yaml."
  value       = { for key, role in aws_iam_role.pods : key => role.arn }
}

output "instance_profiles" {
  description = "For IamInstanceProfile in cluster.yaml."
  value       = { for key, profile in aws_iam_instance_profile.machines : key => profile.arn }
}

output "security_group" {
  description = "For SecurityGroupIds in cluster.yaml."
  value       = one(aws_security_group.machines[*].id)
}
