package network

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// tableName is our one table in a replica's namespace.
const tableName = "portolan"

// chain is one base chain and its rules; the first that matches decides.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	policy   nftables.ChainPolicy
	rules    [][]expr.Any
}

// captureChains is the whole capture:
//
//   - outbound TCP goes to Envoy, but for Envoy's own, for lo, and for DNS over
//     TCP at the node;
//   - inbound TCP goes to Envoy;
//   - of everything else only DNS at the node leaves, and only what belongs to
//     it comes in; IPv6 does neither.
func captureChains() []chain {
	dns := netip.MustParseAddr(LinkAddress)
	v6 := cat(meta(expr.MetaKeyNFPROTO), equal([]byte{unix.NFPROTO_IPV6}))
	tcp := cat(meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_TCP}))
	udp := cat(meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_UDP}))
	toNode := cat(meta(expr.MetaKeyNFPROTO), equal([]byte{unix.NFPROTO_IPV4}), addressAt(16, dns), portAt(2, 53))
	fromNode := cat(meta(expr.MetaKeyNFPROTO), equal([]byte{unix.NFPROTO_IPV4}), addressAt(12, dns), portAt(0, 53))
	lo := []byte("lo\x00")
	return []chain{
		{
			name: "output_nat", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput,
			priority: nftables.ChainPriorityNATDest, policy: nftables.ChainPolicyAccept,
			rules: [][]expr.Any{
				cat(meta(expr.MetaKeySKUID), equal(binaryutil.NativeEndian.PutUint32(ProxyUID)), verdict(expr.VerdictReturn)),
				cat(meta(expr.MetaKeyOIFNAME), equal(lo), verdict(expr.VerdictReturn)),
				cat(tcp, toNode, verdict(expr.VerdictReturn)),
				cat(tcp, redirect(OutboundPort)),
			},
		},
		{
			name: "prerouting_nat", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting,
			priority: nftables.ChainPriorityNATDest, policy: nftables.ChainPolicyAccept,
			rules: [][]expr.Any{
				cat(meta(expr.MetaKeyIIFNAME), equal(lo), verdict(expr.VerdictReturn)),
				cat(tcp, redirect(InboundPort)),
			},
		},
		{
			name: "output", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput,
			priority: nftables.ChainPriorityFilter, policy: nftables.ChainPolicyDrop,
			rules: [][]expr.Any{
				cat(meta(expr.MetaKeyOIFNAME), equal(lo), verdict(expr.VerdictAccept)),
				cat(v6, verdict(expr.VerdictDrop)),
				cat(tcp, verdict(expr.VerdictAccept)),
				cat(udp, toNode, verdict(expr.VerdictAccept)),
			},
		},
		{
			name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput,
			priority: nftables.ChainPriorityFilter, policy: nftables.ChainPolicyDrop,
			rules: [][]expr.Any{
				cat(meta(expr.MetaKeyIIFNAME), equal(lo), verdict(expr.VerdictAccept)),
				cat(v6, verdict(expr.VerdictDrop)),
				cat(tcp, verdict(expr.VerdictAccept)),
				cat(udp, fromNode, verdict(expr.VerdictAccept)),
				cat(related(), verdict(expr.VerdictAccept)),
			},
		},
	}
}

// ensureCapture puts the table into the namespace in one transaction, unless it
// is there as it should be. Connections that are open keep their translation.
func ensureCapture(nsPath string) error {
	ns, err := openNS(nsPath)
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return fmt.Errorf("nftables in namespace: %w", err)
	}
	chains := captureChains()
	tag := captureTag(chains)
	intact, err := captureIntact(conn, chains, tag)
	if err != nil || intact {
		return err
	}
	table := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	for i := range chains {
		c := &chains[i]
		added := conn.AddChain(&nftables.Chain{Name: c.name, Table: table, Type: c.kind, Hooknum: c.hook, Priority: c.priority, Policy: &c.policy})
		for _, r := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: added, Exprs: r, UserData: tag})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("commit rules: %w", err)
	}
	return nil
}

// captureTag travels as user data of each rule: another build's rules differ.
func captureTag(chains []chain) []byte {
	h := sha256.New()
	for _, c := range chains {
		fmt.Fprintf(h, "%s %s %d %d %d\n", c.name, c.kind, *c.hook, *c.priority, c.policy)
		for _, r := range c.rules {
			for _, e := range r {
				fmt.Fprintf(h, "%T %+v;", e, e)
			}
			fmt.Fprintln(h)
		}
	}
	return []byte(hex.EncodeToString(h.Sum(nil))[:32])
}

func captureIntact(conn *nftables.Conn, chains []chain, tag []byte) (bool, error) {
	have, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list chains: %w", err)
	}
	byName := map[string]*nftables.Chain{}
	for _, c := range have {
		if c.Table.Name == tableName {
			byName[c.Name] = c
		}
	}
	if len(byName) != len(chains) {
		return false, nil
	}
	for _, want := range chains {
		c := byName[want.name]
		if c == nil || c.Policy == nil || *c.Policy != want.policy {
			return false, nil
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return false, fmt.Errorf("list rules of %s: %w", c.Name, err)
		}
		if len(rules) != len(want.rules) {
			return false, nil
		}
		for _, r := range rules {
			if string(r.UserData) != string(tag) {
				return false, nil
			}
		}
	}
	return true, nil
}

func cat(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func meta(key expr.MetaKey) []expr.Any { return []expr.Any{&expr.Meta{Key: key, Register: 1}} }

func equal(data []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

// addressAt compares the IPv4 address at an offset of the network header.
func addressAt(offset uint32, a netip.Addr) []expr.Any {
	load := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}
	return append([]expr.Any{load}, equal(a.AsSlice())...)
}

// portAt compares the port at an offset of the transport header.
func portAt(offset uint32, port uint16) []expr.Any {
	load := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2}
	return append([]expr.Any{load}, equal(binaryutil.BigEndian.PutUint16(port))...)
}

func redirect(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Redir{RegisterProtoMin: 1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED},
	}
}

// related lets errors about our own packets in: path MTU, unreachable.
func related() []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitRELATED), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}
