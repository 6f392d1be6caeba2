# Who may do what. Pods become `run` and `mlflow` by their service accounts (IRSA), machines of cluster.yaml `head` and
# `worker` by their instance profiles; there is no user and no access key.

# ---- What a run needs of S3.
data "aws_iam_policy_document" "run" {
  statement {
    sid = "List"
    # The same right answers HeadBucket, and decides whether a missing object is told as missing (404) or as forbidden
    # (403). Neither has a prefix, so the condition is for the requests that do.
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]
    condition {
      test     = "StringLikeIfExists"
      variable = "s3:prefix"
      values   = ["runs/*", "data/*"]
    }
  }
  statement {
    sid = "OwnFiles"
    # PutObject covers the conditional create (If-None-Match) on which the run log and its fencing rest.
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${aws_s3_bucket.this.arn}/runs/*"]
  }
  statement {
    sid       = "Data"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.this.arn}/data/*"]
  }
}

resource "aws_iam_policy" "run" {
  name   = "${var.name}-run"
  policy = data.aws_iam_policy_document.run.json
}

data "aws_iam_policy_document" "mlflow" {
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]
    condition {
      test     = "StringLikeIfExists"
      variable = "s3:prefix"
      values   = ["mlflow/*"]
    }
  }
  statement {
    sid       = "Artifacts"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${aws_s3_bucket.this.arn}/mlflow/*"]
  }
}

resource "aws_iam_policy" "mlflow" {
  name   = "${var.name}-mlflow"
  policy = data.aws_iam_policy_document.mlflow.json
}

# ---- Pods on EKS.
locals {
  pods = {
    for key, role in {
      run    = { accounts = ["ray-head", "ray-worker"], policy = aws_iam_policy.run.arn }
      mlflow = { accounts = ["mlflow"], policy = aws_iam_policy.mlflow.arn }
    } : key => role if var.oidc_provider_arn != null
  }
  oidc = var.oidc_provider_arn == null ? "" : split("oidc-provider/", var.oidc_provider_arn)[1]
}

data "aws_iam_policy_document" "pods" {
  for_each = local.pods
  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]
    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.oidc}:sub"
      values   = [for account in each.value.accounts : "system:serviceaccount:${var.namespace}:${account}"]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.oidc}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "pods" {
  for_each           = local.pods
  name               = "${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.pods[each.key].json
}

resource "aws_iam_role_policy_attachment" "pods" {
  for_each   = local.pods
  role       = aws_iam_role.pods[each.key].name
  policy_arn = each.value.policy
}

# ---- Machines of the Ray cluster launcher.
locals {
  machines = toset([for machine in ["head", "worker"] : machine if var.vpc_id != null])
}

data "aws_iam_policy_document" "ec2" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "machines" {
  for_each           = local.machines
  name               = "${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.ec2.json
}

resource "aws_iam_instance_profile" "machines" {
  for_each = local.machines
  name     = "${var.name}-${each.key}"
  role     = aws_iam_role.machines[each.key].name
}

resource "aws_iam_role_policy_attachment" "machines" {
  for_each   = local.machines
  role       = aws_iam_role.machines[each.key].name
  policy_arn = aws_iam_policy.run.arn
}

# The head's autoscaler starts and ends workers, and touches no machine but those of its own cluster. The role that Ray
# would make by itself has all of EC2 and all of S3.
data "aws_caller_identity" "this" {}

data "aws_iam_policy_document" "autoscaler" {
  count = var.vpc_id == null ? 0 : 1
  statement {
    sid       = "Look"
    actions   = ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes"]
    resources = ["*"] # These two know no narrower one.
  }
  statement {
    sid       = "StartOwn"
    actions   = ["ec2:RunInstances"]
    resources = ["arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid     = "StartWith"
    actions = ["ec2:RunInstances"]
    resources = concat(
      ["arn:aws:ec2:${var.region}::image/*"],
      [
        for kind in ["key-pair", "network-interface", "security-group", "subnet", "volume"] :
        "arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:${kind}/*"
      ]
    )
  }
  statement {
    sid       = "TagAtStart"
    actions   = ["ec2:CreateTags"]
    resources = ["arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }
  statement {
    sid       = "TagAndEndOwn"
    actions   = ["ec2:CreateTags", "ec2:TerminateInstances"]
    resources = ["arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid       = "GiveWorkersTheirRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.machines["worker"].arn]
    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role_policy" "autoscaler" {
  count  = var.vpc_id == null ? 0 : 1
  name   = "autoscaler"
  role   = aws_iam_role.machines["head"].name
  policy = data.aws_iam_policy_document.autoscaler[0].json
}
