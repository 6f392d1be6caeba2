variable "name" {
  description = "Begins the names of all roles; also the cluster_name of cluster.yaml."
  type        = string
  default     = "raymuon"
}

variable "region" {
  description = "Of the bucket and the machines: traffic between regions is slow and costs money."
  type        = string
}

variable "bucket" {
  description = "The bucket to make. Runs go under runs/, MLflow's artifacts under mlflow/, data under data/."
  type        = string
}

variable "keep_deleted_days" {
  description = "Days for which a deleted object can be brought back; each costs the checkpoints of a day."
  type        = number
  default     = 3
}

variable "oidc_provider_arn" {
  description = "IAM OIDC provider of the EKS cluster; null without Kubernetes."
  type        = string
  default     = null
}

variable "namespace" {
  description = "Kubernetes namespace of infra/kubernetes."
  type        = string
  default     = "raymuon"
}

variable "vpc_id" {
  description = "Network for the machines of cluster.yaml; null without the cluster launcher."
  type        = string
  default     = null
}

variable "ssh_cidrs" {
  description = "Addresses from which `ray up` reaches the head by SSH; Ray's own group lets in all."
  type        = list(string)
  default     = []

  validation {
    condition     = !contains(var.ssh_cidrs, "0.0.0.0/0")
    error_message = "SSH must not be open to the whole internet; name your own addresses."
  }
}
