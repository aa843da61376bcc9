package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"sigs.k8s.io/yaml"
)

// api is the little of the Kubernetes API that starting a cluster needs.
type api struct {
	client *http.Client
	base   string
}

// newAPI opens the API with the administrator's kubeconfig.
func (c Config) newAPI() (*api, error) {
	raw, err := os.ReadFile(c.path("kubeconfig"))
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server    string `json:"server"`
				Authority string `json:"certificate-authority-data"`
			} `json:"cluster"`
		} `json:"clusters"`
		Users []struct {
			User struct {
				Certificate string `json:"client-certificate-data"`
				Key         string `json:"client-key-data"`
			} `json:"user"`
		} `json:"users"`
	}
	if err := yaml.Unmarshal(raw, &config); err != nil || len(config.Clusters) != 1 || len(config.Users) != 1 {
		return nil, fmt.Errorf("read kubeconfig: want one cluster and one user: %w", err)
	}
	decoded := make([][]byte, 3)
	for i, text := range []string{config.Clusters[0].Cluster.Authority, config.Users[0].User.Certificate, config.Users[0].User.Key} {
		if decoded[i], err = base64.StdEncoding.DecodeString(text); err != nil {
			return nil, fmt.Errorf("read kubeconfig: %w", err)
		}
	}
	pair, err := tls.X509KeyPair(decoded[1], decoded[2])
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(decoded[0])
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}
	return &api{client: &http.Client{Transport: transport, Timeout: 10 * time.Second}, base: config.Clusters[0].Cluster.Server}, nil
}

// do sends a request and decodes a JSON answer into out, if that is not nil.
func (a *api) do(ctx context.Context, method, path, contentType string, body []byte, out any) error {
	request, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("ask the API server: %w", err)
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := a.client.Do(request)
	if err != nil {
		return fmt.Errorf("ask the API server: %w", err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(io.LimitReader(response.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("read the API server's answer: %w", err)
	}
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s %s: status %d: %.300s", method, path, response.StatusCode, content)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(content, out); err != nil {
		return fmt.Errorf("read the API server's answer to %s %s: %w", method, path, err)
	}
	return nil
}

func (a *api) get(ctx context.Context, path string, out any) error {
	return a.do(ctx, http.MethodGet, path, "", nil, out)
}

// node is the part of a Kubernetes Node that start-up looks at.
type apiNode struct {
	Metadata struct {
		Name string `json:"name"`
	} `json:"metadata"`
	Spec struct {
		PodCIDR string `json:"podCIDR"`
	} `json:"spec"`
	Status struct {
		NodeInfo struct {
			BootID string `json:"bootID"`
		} `json:"nodeInfo"`
		Conditions []struct {
			Type   string `json:"type"`
			Status string `json:"status"`
		} `json:"conditions"`
	} `json:"status"`
}

func (n apiNode) ready() bool {
	for _, condition := range n.Status.Conditions {
		if condition.Type == "Ready" {
			return condition.Status == "True"
		}
	}
	return false
}

// waitFor polls until done says so. An error of done is kept as the reason if time runs out.
func waitFor(ctx context.Context, what string, timeout time.Duration, done func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var last error
	err := poll(ctx, func() (bool, error) { last = done(ctx); return last == nil, nil })
	if err != nil {
		return fmt.Errorf("wait for %s: not there after %s: %w", what, timeout, last)
	}
	return nil
}
