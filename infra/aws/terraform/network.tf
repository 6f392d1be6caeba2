# The machines of cluster.yaml talk to each other on all ports (Ray, the rendezvous and NCCL take free ones), and to the
# outside only as clients. Dashboards are on loopback: `ray dashboard` forwards them through SSH.
resource "aws_security_group" "machines" {
  #checkov:skip=CKV2_AWS_5:cluster.yaml puts its machines into it.
  count       = var.vpc_id == null ? 0 : 1
  name        = "${var.name}-ray"
  description = "Ray nodes of ${var.name}"
  vpc_id      = var.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "each_other" {
  count                        = var.vpc_id == null ? 0 : 1
  security_group_id            = aws_security_group.machines[0].id
  description                  = "Among the nodes"
  referenced_security_group_id = aws_security_group.machines[0].id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_ingress_rule" "ssh" {
  for_each          = toset([for cidr in var.ssh_cidrs : cidr if var.vpc_id != null])
  security_group_id = aws_security_group.machines[0].id
  description       = "ray up"
  cidr_ipv4         = each.value
  ip_protocol       = "tcp"
  from_port         = 22
  to_port           = 22
}

resource "aws_vpc_security_group_egress_rule" "each_other" {
  count                        = var.vpc_id == null ? 0 : 1
  security_group_id            = aws_security_group.machines[0].id
  description                  = "Among the nodes"
  referenced_security_group_id = aws_security_group.machines[0].id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "out" {
  for_each          = toset([for port in ["80", "443"] : port if var.vpc_id != null])
  security_group_id = aws_security_group.machines[0].id
  description       = "S3, STS, EC2 and packages"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = tonumber(each.value)
  to_port           = tonumber(each.value)
}
