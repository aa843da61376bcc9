package cluster

import "fmt"

// Folders inside the machines.
const (
	binFolder  = "/opt/weft/bin"   // the cluster's programs
	confFolder = "/etc/kubernetes" // keys, certificates and client configurations
)

const controlPlaneName = "cp"

// controlPlaneMachine is etcd, the API server, the controllers and the scheduler.
func (s *state) controlPlaneMachine() machine {
	v4, _ := s.controlPlane()
	return machine{
		Name:   controlPlaneName,
		Group:  s.group(controlPlaneName),
		Folder: s.path(controlPlaneName),
		Logs:   s.path("logs"),
		Layout: s.Layout,
		Binds: []bind{
			{Source: s.Cache + "/bin", Target: binFolder, ReadOnly: true},
			{Source: "kubernetes", Target: confFolder, ReadOnly: true},
			{Source: "etcd", Target: "/var/lib/etcd"},
		},
		Sysctls: map[string]string{
			"net/ipv4/ip_forward":          "1",
			"net/ipv6/conf/all/forwarding": "1",
			// Frames between the nodes are the nodes' business.
			"net/bridge/bridge-nf-call-iptables":  "0",
			"net/bridge/bridge-nf-call-ip6tables": "0",
		},
		Files: map[string]string{"/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n" + v4.String() + " " + controlPlaneName + "\n"},
		Units: s.controlPlaneUnits(),
	}
}

func (s *state) controlPlaneUnits() []unit {
	plane4, _ := s.controlPlane()
	service4, service6 := s.serviceNet()
	file := func(name string) string { return confFolder + "/" + name }
	k8s := binFolder + "/k8s"
	return []unit{
		{Name: "etcd", Argv: []string{binFolder + "/etcd",
			"--data-dir=/var/lib/etcd", "--unsafe-no-fsync", "--snapshot-count=10000",
			"--listen-client-urls=https://127.0.0.1:2379", "--advertise-client-urls=https://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380",
			"--client-cert-auth", "--trusted-ca-file=" + file("etcd-ca.crt"), "--cert-file=" + file("etcd.crt"), "--key-file=" + file("etcd.key")}},
		{Name: "kube-apiserver", Argv: []string{k8s, "kube-apiserver",
			"--etcd-servers=https://127.0.0.1:2379", "--etcd-cafile=" + file("etcd-ca.crt"), "--etcd-certfile=" + file("apiserver-etcd.crt"), "--etcd-keyfile=" + file("apiserver-etcd.key"),
			"--bind-address=::", "--advertise-address=" + plane4.String(),
			"--tls-cert-file=" + file("apiserver.crt"), "--tls-private-key-file=" + file("apiserver.key"), "--client-ca-file=" + file("ca.crt"),
			"--kubelet-client-certificate=" + file("apiserver-kubelet.crt"), "--kubelet-client-key=" + file("apiserver-kubelet.key"),
			"--kubelet-certificate-authority=" + file("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--requestheader-client-ca-file=" + file("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=" + file("front-proxy.crt"), "--proxy-client-key-file=" + file("front-proxy.key"), "--enable-aggregator-routing=true",
			"--service-account-key-file=" + file("service-accounts.crt"), "--service-account-signing-key-file=" + file("service-accounts.key"),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
			fmt.Sprintf("--service-cluster-ip-range=%s,%s", service4, service6)}},
		{Name: "kube-controller-manager", Argv: []string{k8s, "kube-controller-manager",
			"--kubeconfig=" + file("controller-manager.conf"), "--use-service-account-credentials=true", "--leader-elect=false",
			"--service-account-private-key-file=" + file("service-accounts.key"), "--root-ca-file=" + file("ca.crt"),
			"--cluster-signing-cert-file=" + file("ca.crt"), "--cluster-signing-key-file=" + file("ca.key"),
			"--flex-volume-plugin-dir=/var/lib/kubelet/volume-plugins",
			// A stopped node is NotReady after 12 s instead of 50 s.
			"--node-monitor-grace-period=12s", "--node-monitor-period=1s"}},
		{Name: "kube-scheduler", Argv: []string{k8s, "kube-scheduler", "--kubeconfig=" + file("scheduler.conf"), "--leader-elect=false"}},
	}
}
